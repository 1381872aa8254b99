"""Timing a checkpoint, its layers, and kernels of one's own."""
