"""The model in PyTorch: what every fast path is tested against."""
