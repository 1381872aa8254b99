"""Records, metrics and logs of requests."""
