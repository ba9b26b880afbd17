"""Events become metrics and log lines."""
