"""Views of results: the frontier of a sweep, its plots and report, the loss curve of a run."""
