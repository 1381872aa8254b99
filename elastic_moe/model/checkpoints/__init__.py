"""Checkpoint folders: finding, reading, checking, writing, extracting."""
