"""Conversion between bytes and values. Pure: no module here does I/O or reads a clock."""
