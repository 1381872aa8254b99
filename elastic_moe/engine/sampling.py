"""Choosing the next token from logits.

Randomness is counter-based: a draw depends on (seed, position) alone, not on what ran before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elastic_moe.engine.request import SamplingParams, TokenLogprob


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of seed and position (Philox 4x64)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    return float(generator.random())


def choose_token(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The next token's id from logits (V,), for the given position of the completion."""
    if params.temperature == 0:
        return int(logits.numpy(force=True).argmax())  # the first among equals
    scaled = (logits.double() - logits.max()) / params.temperature
    probabilities, ids = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    if params.top_k:
        probabilities = probabilities[: params.top_k]
    reached = probabilities.cumsum(0)
    # The smallest set whose sum is at least top_p: a token stays if those before it fall short.
    probabilities = probabilities[(reached - probabilities) < params.top_p]
    reached = probabilities.cumsum(0)
    drawn = uniform(params.seed, position) * float(reached[-1])
    index = int(torch.searchsorted(reached, drawn, right=True))
    return int(ids[min(index, len(probabilities) - 1)])


def token_logprob(logits: Tensor, token_id: int, top: int) -> TokenLogprob:
    """Log-probability of `token_id` under logits (V,), and the `top` most likely tokens."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = logprobs.topk(top) if top else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(pairs))
