"""Intervals, whose coverage is measured by the study `intervals`."""
