"""What the kernel benchmarks run on: the standard model with random weights, and routings."""

from __future__ import annotations

from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from elastic_moe.lab.bench.layer import LayerInputs, LayerWeights, NativeExperts, pad_rows
from elastic_moe.lab.sweeps.text import language_reference
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.loading import load_model
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import DecoderLayer, ElasticTransformer, Trace
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet

ROWS = (1, 4, 16, 64, 512, 2048)
ROUTINGS = ("balanced", "skewed", "recorded")
LAYERS, EXPERTS, TOP_K, HIDDEN, CHANNELS, VOCAB = 8, 64, 8, 1024, 512, 32000
HEADS, HEAD_DIM = 16, 64
CHECKED_ROWS = 16  # rows of a result that are compared with float64
STANDARD = ModelConfig(
    model_type="olmoe",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    num_experts=EXPERTS,
    max_top_k=TOP_K,
    expert_hidden=CHANNELS,
    max_positions=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tied_embeddings=False,
    qk_norm="all",
    renormalize=False,
)


@cache
def standard_model() -> ElasticTransformer:
    """The standard case in bf16: 905 M random weights."""
    with torch.device("meta"):
        model = ElasticTransformer(STANDARD)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            state[name] = torch.ones(p.shape)
        else:
            small = name.endswith("mlp.gate.weight")
            values = torch.empty(p.shape, dtype=torch.float32 if small else torch.bfloat16)
            state[name] = values.normal_(std=0.02, generator=generator)
    model.load_state_dict(state, assign=True)
    model.set_input_dtype(torch.bfloat16)
    return model.requires_grad_(False).eval()


def layer_weights(layer: int) -> LayerWeights:
    """The plain experts of one layer."""
    block = standard_model().layers[layer]
    assert isinstance(block, DecoderLayer)
    assert isinstance(block.mlp, MoE)
    experts = block.mlp.experts
    return LayerWeights(experts.gate_proj, experts.up_proj, experts.down_proj)


@cache
def native_experts() -> list[NativeExperts]:
    """The packed experts of every layer."""
    return [NativeExperts(layer_weights(i)) for i in range(LAYERS)]


@cache
def fused_experts() -> list[tuple[Tensor, Tensor]]:
    """gate_up (E, 2F, D) and down (E, D, F) of every layer, as transformers stores them."""
    every = [layer_weights(i) for i in range(LAYERS)]
    return [(torch.cat([w.gate, w.up], dim=1), w.down) for w in every]


def layer_inputs(
    rows: int, routing: str, *, top_k: int = TOP_K, channels: int = CHANNELS, layer: int = 0
) -> LayerInputs:
    """Random rows with a routing of one kind, another one in each layer."""
    generator = torch.Generator().manual_seed(1000 * rows + layer)
    x = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
    if routing == "recorded":
        ids = recorded_routing()[layer % len(recorded_routing()), :rows, :top_k]
    else:
        logits = torch.randn(rows, EXPERTS, generator=generator)
        if routing == "skewed":  # as Zipf's law: the first expert is in nearly every row
            logits -= 1.2 * torch.arange(1, EXPERTS + 1).log()
        ids = logits.topk(top_k).indices
    weights = torch.rand(rows, top_k, generator=generator).softmax(-1)
    return LayerInputs(
        pad_rows(x),
        ids.to(torch.int32).contiguous(),
        weights,
        torch.full((rows,), channels, dtype=torch.int32),
    )


@cache
def recorded_routing() -> Tensor:
    """Ids (12, 2048, 8) of 64 experts that real text chose.

    elastic-mini has 16 experts per layer and 4 per token. Four of its layers make one of ours:
    expert e of the j-th of them becomes 16j + e, and of each the two best of every token are taken.
    """
    folder = BUNDLED / "elastic-mini"
    model, ids = load_model(folder), Tokenizer(folder).encode(language_reference().text[:40_000])
    kept: list[Tensor] = []  # (512, 48, 2) each
    for start in range(0, 2048, 512):
        trace = Trace()
        with torch.inference_mode():
            window = torch.tensor([ids[start : start + 512]])
            model.last_state(window, Subnet.full(model.shape), trace=trace)
        kept.append(torch.stack([layer.topk_ids[:, :2] for layer in trace.layers], dim=1))
    best = torch.cat(kept).view(2048, 12, 4, 2)  # token, layer of ours, layer of four, best two
    offsets = 16 * torch.arange(4).view(4, 1)
    return (best + offsets).transpose(2, 3).reshape(2048, 12, 8).transpose(0, 1).contiguous()


def in_turn(things: list[Any], *, cold: bool) -> Any:
    """Endless: all in turn, so that each is cold when it comes again; or the first one always."""
    return cycle(things if cold else things[:1])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of what is exact."""
    return float((got.double() - exact).square().mean().div(exact.square().mean()).sqrt())
