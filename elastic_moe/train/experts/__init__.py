"""Experts of a training step on every kind of hardware."""
