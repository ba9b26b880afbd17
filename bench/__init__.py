"""Where Breakwater stands beside the others, measured in one run. See README.md here."""
