"""Progress of bulk work."""

from cloudinary_analyze import AnalyzeSession, Captioning, progress
from cloudinary_analyze.progress import Meter, ProgressReporter, Reading, describe_reading


async def run(session: AnalyzeSession, urls: list[str]) -> None:
    """Show a progress bar."""
    stream = session.map(urls, Captioning)
    async with progress.show_progress(session, stream, total=len(urls)) as outcomes:
        async for outcome in outcomes:
            print(outcome.item, outcome.unwrap().analysis.caption)


async def watch(done: list[str]) -> None:
    """Print progress lines about other work."""
    meter = Meter()

    def read() -> Reading:
        return Reading(done=len(done), failed=0, total=100)

    meter.add(read())
    print(describe_reading(read(), meter), meter.rate)
    async with ProgressReporter(read, None, print, interval=5.0):
        done.append("a")
