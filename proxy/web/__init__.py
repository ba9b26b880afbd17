"""Adapters: HTTP in."""
