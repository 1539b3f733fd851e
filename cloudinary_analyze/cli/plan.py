"""The plan of a run, from its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from cloudinary_analyze.cli.feed import LineSource, build_sample_source
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.money import SpendingOptions
from cloudinary_analyze.cli.notifications import ReceivingOptions
from cloudinary_analyze.cli.output import Places
from cloudinary_analyze.cli.screen import DisplayOptions
from cloudinary_analyze.cli.service import CallOptions, Service
from cloudinary_analyze.config import Settings


@attrs.frozen(kw_only=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        models: The builders of requests, by model name.
        source: Where the lines come from. ``None``: the emulator's gallery.
        samples: The number of pictures of the gallery.
        places: Where the results go.
        named: Whether the input names its items.
        retry_failed: Whether permanent failures are sent again.
        receiving: How the results arrive.
        calling: How calls are made.
        spending: What the run may spend.
        display: What is shown during the run.
        limit: The maximum number of lines.
        emulated: Whether to call an emulator in this process.
    """

    models: Mapping[str, BuildRequest]
    source: LineSource | None
    samples: int
    places: Places
    named: bool
    retry_failed: bool
    receiving: ReceivingOptions
    calling: CallOptions
    spending: SpendingOptions
    display: DisplayOptions
    limit: int | None
    emulated: bool

    @property
    def mode(self) -> Literal["call", "task"]:
        """See `AnalyzeSession.map`."""
        return self.receiving.mode

    def build_settings(self, service: Service) -> Settings:
        """Return the settings of the session.

        Raises:
            ConfigurationError: A value is invalid.
            CommandError: A proxy leads away from an emulator in this process.
        """
        # only the retry of a result that was never delivered is charged again
        again = self.retry_failed and self.receiving.as_tasks
        missing: Literal["raise", "analyze"] = "analyze" if again else "raise"
        return self.calling.build_settings(service, on_missing_result=missing)

    def choose_source(self, service: Service) -> LineSource:
        """Return the source of the lines."""
        if self.source is not None:
            return self.source
        assert service.emulator is not None
        return build_sample_source(service.emulator.sample_urls(self.samples))
