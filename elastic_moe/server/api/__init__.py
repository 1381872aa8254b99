"""Endpoints, one file per path. `generation`, `sampling` and `logprobs` are shared by them."""
