"""Reading a whole text at once, beside the requests that are written: logits and embeddings.

The text is read in chunks, between which the steps of others run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from elastic_moe.engine.core import EngineCore
from elastic_moe.engine.outputs import Embedding, RoutingStats
from elastic_moe.engine.running.runner import Chunk, Floats, LogitsMode, ModelRunner, StepOutput
from elastic_moe.routing import Subnet

CHUNK_TOKENS = 1024


def score(core: EngineCore, runner: ModelRunner, subnet: Subnet, tokens: Sequence[int]) -> Floats:
    """Logits (T, V) float32."""
    return np.concatenate([out.logits for out in _read(core, runner, subnet, tokens, "all")])


def embed(
    core: EngineCore, runner: ModelRunner, subnet: Subnet, tokens: Sequence[int]
) -> Embedding:
    """The mean of the states that the head would see, scaled to length 1."""
    last = len(subnet.layers)
    total, experts = np.zeros(runner.config.hidden_size), 0
    for out in _read(core, runner, subnet, tokens, "none", (last,)):
        total += runner.final_states(out.states[last]).sum(axis=0, dtype=np.float64)  # (D,)
        experts += out.experts_run[0]
    vector = (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)
    routing = RoutingStats.of(subnet, len(tokens), experts, len(tokens) // 2)
    return Embedding(vector, len(tokens), routing)


def _read(
    core: EngineCore,
    runner: ModelRunner,
    subnet: Subnet,
    tokens: Sequence[int],
    logits: LogitsMode,
    states_after: Sequence[int] = (),
) -> Iterator[StepOutput]:
    """Run the tokens, a chunk at a time."""
    sequence = runner.open(subnet, len(tokens))
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = Chunk(sequence, tokens[first : first + CHUNK_TOKENS], logits)
        yield core.call(partial(runner.run, [chunk], states_after=states_after))
