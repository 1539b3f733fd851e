"""A local stand-in for the Analyze API: develop and test without an account, at no cost.

It validates requests and shapes answers by itself: of the package it knows only the signature
and the plain :class:`~cloudinary_analyze.responses.Delivery`.
"""

from cloudinary_analyze.emulator.counts import Counts
from cloudinary_analyze.emulator.faults import FaultPlan
from cloudinary_analyze.emulator.notices import EmulatedTask
from cloudinary_analyze.emulator.server import Emulator
from cloudinary_analyze.emulator.webhooks import WebhookPolicy

__all__ = ["Counts", "EmulatedTask", "Emulator", "FaultPlan", "WebhookPolicy"]
