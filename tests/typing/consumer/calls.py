"""Calls, tasks and streams, with every outcome and every error."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Unpack

import attrs

from cloudinary_analyze import (
    Analysis,
    AnalysisTask,
    AnalyzeError,
    AnalyzeSession,
    Answered,
    ApiError,
    AttemptTimeoutError,
    AuthenticationError,
    BadRequestError,
    Budget,
    BudgetReachedError,
    BulkStoppedError,
    CallTimeoutError,
    Captioning,
    CaptioningAnalysis,
    Coco,
    CocoAnalysis,
    ConfigurationError,
    Credentials,
    Failed,
    ForeignCancellationError,
    InvalidRequestError,
    LedgerError,
    Limit,
    NotFoundError,
    OutageError,
    Outcome,
    OutcomeStream,
    PacerError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RemoteError,
    Response,
    ResponseDecodeError,
    ResultNotDeliveredError,
    ServerError,
    SessionAlreadyOpenError,
    SessionClosedError,
    SessionNotOpenError,
    SessionStateError,
    SessionStats,
    Settings,
    Spent,
    TaskFailedError,
    TaskLimitError,
    TaskStatus,
    TaskTimeoutError,
    TransportError,
    WrongEventLoopError,
    __version__,
    config,
    errors,
    outcomes,
    proxy_from_environment,
    to_dict,
    to_json,
)

URL = "https://example.com/a.jpg"


class Limiter:
    """A custom pacer."""

    async def acquire(self) -> None:
        """Wait."""
        await asyncio.sleep(0)


async def renew_token() -> str:
    """Return a token."""
    return "token"


def build_session() -> AnalyzeSession:
    """Return a session with most options."""
    pacer: config.Pacer = Limiter()
    credentials: config.Credentials = Credentials("demo", oauth_token=renew_token)
    proxy: str | None = proxy_from_environment() or config.proxy_from_environment("api-eu.test")
    settings: config.Settings = attrs.evolve(
        Settings(permits=8, pacer=pacer, proxy=proxy), attempts=3
    )
    return AnalyzeSession(credentials, settings=settings)


async def wait_for_tasks(session: AnalyzeSession) -> None:
    """Handles are futures: asyncio's functions take them and keep their types."""
    first: AnalysisTask[CaptioningAnalysis] = session.submit(Captioning(URL))
    second: AnalysisTask[CocoAnalysis] = session.submit(Coco(URL), mode="task", timeout=60)
    futures: list[asyncio.Future[Response[CaptioningAnalysis]]] = [first.as_future()]
    done, pending = await asyncio.wait(futures, timeout=1, return_when="FIRST_COMPLETED")
    for future in done:
        print(future.result().analysis.caption)
    print(len(pending))
    caption, objects = await asyncio.gather(first, second)
    print(caption.analysis.caption, len(objects.analysis.detections))
    mixed: set[asyncio.Future[Response[Analysis]]] = {
        task.as_future() for task in list[AnalysisTask[Analysis]]([first, second])
    }
    for next_future in asyncio.as_completed(mixed):
        response: Response[Analysis] = await next_future
        print(response.model)
    async with asyncio.timeout(5):
        print((await first).analysis.caption, (await asyncio.wait_for(second, 1)).entity)
    task_id: str | None = await second.accepted()
    if task_id is not None:
        again: AnalysisTask[CocoAnalysis] = session.task(task_id, Coco)
        again.add_done_callback(report)
        status: TaskStatus = await session.task_status(task_id)
        print(status.finished, (await again.wait()).state, again.done(), again.exception())
        again.abandon()


def report(task: AnalysisTask[CocoAnalysis]) -> None:
    """Print the result of a task."""
    print(len(task.result().analysis.detections))


async def run(session: AnalyzeSession, urls: AsyncIterator[str]) -> Spent | None:
    """Run a stream with a budget."""
    budget = Budget(calls=100, units={"object_detection": 50})
    stream: OutcomeStream[str, CaptioningAnalysis] = session.map(
        urls, Captioning, window=10, ordered=True, budget=budget
    )
    async with stream:
        async for outcome in stream:
            print(describe(outcome), describe_any(outcome))
    for each in await session.analyze_all([Captioning(URL), Coco(URL)]):
        print(each.error or each.unwrap().analysis.model_version)
    stats: SessionStats = session.stats
    quota: Mapping[str, Limit] = session.quota
    print(stats.calls, {name: limit.remaining for name, limit in quota.items()}, __version__)
    return stream.spent


def describe(outcome: Outcome[str, CaptioningAnalysis]) -> str:
    """Narrow an outcome by pattern."""
    match outcome:
        case Answered(item=url, response=response):
            return f"{url}: {response.analysis.caption} {response.limits}"
        case Failed(item=url, error=error):
            return f"{url}: {error}"


def describe_any(outcome: outcomes.AnyOutcome) -> str:
    """Narrow an outcome by its class, or by its error."""
    same: outcomes.Outcome[object, Analysis] = outcome
    if isinstance(same, outcomes.Failed):
        return to_json(same.error)
    answered: outcomes.Answered[object, Analysis] = same
    return str(to_dict(answered.response, raw=True))


def build_failure(**fields: Unpack[errors.RemoteFields]) -> ServerError:
    """Return an error, constructed as in an application's tests."""
    return ServerError("The service failed.", **fields)


def judge(error: Exception) -> str:
    """Return the meaning of an error and its details."""
    match error:
        case BudgetReachedError() | BulkStoppedError():
            return f"stopped: {error.reason}"
        case QuotaExceededError():
            return f"quota: {error.limits}"
        case RateLimitedError():
            return f"wait {(error.retry_after or 0.0) + 1.0} s"
        case AuthenticationError() | PermissionDeniedError() | BadRequestError():
            return f"refused: {error.code} {error.details}"
        case NotFoundError() | ServerError():
            return f"{error.status} {error.request_id}"
        case TaskFailedError():
            return f"task {error.task_id} failed: {error.cause_known} {error.limits}"
        case ApiError():
            return f"{error.status} {error.category} {error.raw_body!r}"
        case RemoteError():
            return error.message
        case AttemptTimeoutError() | TransportError():
            return f"{error.attempts} attempts, ambiguous: {error.ambiguous}"
        case CallTimeoutError() | TaskTimeoutError() | ResultNotDeliveredError():
            return f"timeout: {error}"
        case SessionClosedError():
            return f"closed; task {error.task_id}"
        case SessionAlreadyOpenError() | SessionNotOpenError() | WrongEventLoopError():
            return "misuse"
        case SessionStateError() | ConfigurationError() | InvalidRequestError():
            return "misuse"
        case OutageError():
            return f"down for {error.seconds} s after {error.attempts} attempts"
        case PacerError():
            return f"the pacer raised {error.__cause__!r}"
        case TaskLimitError():
            return f"too many tasks: {error.task_id}"
        case ResponseDecodeError():
            return f"unreadable: {error.raw_body!r}"
        case OutageError(seconds=seconds):
            return f"out for {seconds} s"
        case LedgerError() | PacerError() | ForeignCancellationError():
            return "not recorded"
        case AnalyzeError():
            return error.message
        case _:
            return repr(error)
