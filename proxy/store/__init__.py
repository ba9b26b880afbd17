"""Adapters: bytes, records and facts at rest."""
