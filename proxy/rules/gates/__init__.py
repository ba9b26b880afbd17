"""Gates: one file per policy check."""
