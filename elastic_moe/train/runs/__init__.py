"""A run's folder: resume, checkpoint, log, lock, time limit."""
