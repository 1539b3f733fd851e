"""Results of bulk work as files: records, exports and reports."""

from cloudinary_analyze.results.records import build_record, dump_record

__all__ = ["build_record", "dump_record"]
