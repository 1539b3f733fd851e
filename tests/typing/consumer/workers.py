"""A stage that any engine calls, in many processes."""

from concurrent.futures import ProcessPoolExecutor
from typing import Any

from cloudinary_analyze import Captioning, CaptioningAnalysis, Outcome, Settings, stage
from cloudinary_analyze.dask import AnalyzePlugin
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.pacing import RedisPacer
from cloudinary_analyze.stage import AnalyzeStage


def build_stage(redis_url: str) -> AnalyzeStage[str, CaptioningAnalysis]:
    """Return a stage whose workers share what Redis holds."""
    return stage.AnalyzeStage(
        Captioning,
        settings=Settings(pacer=RedisPacer(redis_url, rate=100)),
        ledger=RedisLedger(redis_url),
        notifications=RedisNotifications(redis_url),
        notification_url="https://app.example/hook",
    )


def run(partitions: list[list[str]], redis_url: str) -> list[dict[str, list[Any]]]:
    """Return the columns of each partition."""
    with ProcessPoolExecutor() as pool:
        found: list[list[Outcome[str, CaptioningAnalysis]]] = list(
            pool.map(build_stage(redis_url), partitions)
        )
    print(found[0][0].error, stage.worker_stats(RedisLedger(redis_url)))
    return [stage.outcome_columns(outcomes) for outcomes in found]


async def run_here(urls: list[str], redis_url: str) -> None:
    """Call the stage from a coroutine."""
    for outcome in await build_stage(redis_url).acall(urls):
        print(outcome.unwrap().analysis.caption)
    print(sorted(stage.COLUMNS), stage.SCHEMA, stage.META)
    stage.close_sessions()


plugin = AnalyzePlugin()
