"""The OCI specifications as values. Pure: standard library only, no clock, no I/O."""
