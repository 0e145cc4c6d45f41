"""Comparing replies: labelers, people behind pages, and rounds of the closed loop."""
