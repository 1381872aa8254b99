"""Reading a whole text at once, beside the requests that are written: logits and embeddings.

The text is read in chunks, between which the steps of others run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from elastic_moe.engine.core import EngineCore
from elastic_moe.engine.outputs import Embedding, RoutingStats
from elastic_moe.engine.running.runner import Chunk, LogitsMode, ModelRunner, StepOutput
from elastic_moe.routing import Subnet

CHUNK_TOKENS = 1024


def score(core: EngineCore, runner: ModelRunner, subnet: Subnet, tokens: Sequence[int]) -> Tensor:
    """Logits (T, V) float32."""
    return torch.cat([out.logits for out in _read(core, runner, subnet, tokens, "all")])


def embed(
    core: EngineCore, runner: ModelRunner, subnet: Subnet, tokens: Sequence[int]
) -> Embedding:
    """The mean of the states that the head would see, scaled to length 1."""
    last = len(subnet.layers)
    total, experts = torch.zeros(runner.config.hidden_size, dtype=torch.float64), 0
    for out in _read(core, runner, subnet, tokens, "none", (last,)):
        total += runner.final_states(out.states[last]).double().sum(dim=0).cpu()  # (D,)
        experts += out.experts_run[0]
    vector = torch.nn.functional.normalize(total, dim=0).float()
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
