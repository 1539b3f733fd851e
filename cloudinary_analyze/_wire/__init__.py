"""Bytes to values and back, pure: nothing in this room does I/O or looks at a clock."""
