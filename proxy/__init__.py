"""Breakwater: a caching pull-through proxy appliance for OCI registries."""

__version__ = "0.1.0"
