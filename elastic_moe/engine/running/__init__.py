"""Running a batch of tokens: one interface, the C++ step and the PyTorch reference behind it."""
