"""Adapters: other registries. The only place that speaks HTTP outward."""
