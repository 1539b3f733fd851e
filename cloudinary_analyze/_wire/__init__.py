"""Bytes to values and back, pure: nothing in this package does I/O or reads a clock."""
