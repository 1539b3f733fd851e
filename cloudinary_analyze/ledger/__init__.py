"""Ledgers: durable stores of what bulk work submitted and received."""

from cloudinary_analyze.ledger.sqlite import SQLiteLedger

__all__ = ["SQLiteLedger"]
