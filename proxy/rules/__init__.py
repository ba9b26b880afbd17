"""Decisions. Pure: `now` and numbers are arguments."""
