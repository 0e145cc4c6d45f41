"""Intervals, fits and laws."""
