"""A training step on the C++ kernels: the forward pass by half layers, the head's loss, Muon.

Computes what the model's own modules compute, in float32 on the CPU, several times as fast.
`refusal` says when that is not to be had; everything then runs in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from elastic_moe_kernels import native, training
from torch import Tensor, nn

from elastic_moe.errors import TrainingError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.moe import MoE
from elastic_moe.model.reference.transformer import (
    DecoderLayer,
    ElasticTransformer,
    LayerTrace,
    Trace,
)
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import LayerSubnet, Subnet

# What `last_state` computes of a `ModelConfig`: these fields at any value, `KNOWN_VALUES` at those
# listed, every other at its default alone. A model with another trait is trained in PyTorch:
# `last_state` repeats the forward pass of the reference, and would otherwise train another model.
KNOWN_FIELDS = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "num_experts",
        "max_top_k",
        "expert_hidden",
        "max_positions",
        "rope_theta",
        "rms_norm_eps",
        "tied_embeddings",
        "renormalize",
        "routing_epsilon",
        "selection_bias",
        "elastic",
    }
)
KNOWN_VALUES = {"qk_norm": ("none", "head"), "rope": ("half", "interleaved")}


def refusal(config: ModelConfig, device: torch.device, dtype: str) -> str | None:
    """Why a model cannot be trained on the C++ kernels here; None if it can."""
    if device.type != "cpu":
        return f"they run on the CPU, and the device is {device}"
    if dtype != "float32":
        return f"they compute in float32, and dtype is {dtype}"
    if not native.levels():
        return native.missing()
    missing = ""
    if config.dense_layers:
        missing = "dense layers"
    elif config.shared_hidden:
        missing = "shared experts"
    elif config.qk_norm == "all":
        missing = "norms over all heads"
    if missing:
        return f"they have no {missing}, and this architecture has"
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in KNOWN_FIELDS or value in KNOWN_VALUES.get(item.name, (item.default,)):
            continue
        return f"they do not compute {item.name} = {value!r}, and this architecture has it"
    return training.refusal(config.hidden_size, config.head_dim, config.expert_hidden)


def choose_backend(wanted: str, config: ModelConfig, device: torch.device, dtype: str) -> str:
    """What "auto" comes to, and whether "cpu" can be had.

    Raises:
        TrainingError: it cannot, or there is no such backend.
    """
    if wanted not in ("auto", "reference", "cpu"):
        raise TrainingError(f"backend must be auto, reference or cpu, got {wanted!r}.")
    why = refusal(config, device, dtype)
    if wanted == "cpu" and why is not None:
        raise TrainingError(f"the C++ kernels cannot train this model: {why}. Use backend auto.")
    return "reference" if wanted == "reference" or why is not None else "cpu"


def last_state(
    model: ElasticTransformer, inputs: Tensor, subnet: Subnet
) -> tuple[Tensor, Tensor, Trace]:
    """Run one sub-network on inputs (B, T), all of whose sequences have T tokens.

    Returns:
        The residual stream (B, T, D) after the last layer; the balance loss, summed over layers;
        what the routers did.
    """
    config = model.config
    B, T = inputs.shape
    cos, sin = map(torch.tensor, rotary_angles(T, config.head_dim, config.rope_theta))
    shape = training.AttentionShape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.rope == "interleaved",
    )
    x = model.embed_tokens(inputs)  # (B, T, D)
    balance, trace = torch.zeros(()), Trace()
    for index in subnet.active_layers:
        layer = model.layers[index]
        assert isinstance(layer, DecoderLayer)
        x = _attention(layer, x, cos, sin, shape)
        flat, own_balance, routed = _experts(layer, x.flatten(0, 1), subnet.layers[index], config)
        x = flat.view(B, T, -1)
        balance = balance + own_balance
        trace.layers.append(LayerTrace(index, routed.router_logits, routed.topk_ids))
    return x, balance, trace


def _attention(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, shape: training.AttentionShape
) -> Tensor:
    own = layer.self_attn
    return training.attention_block(
        x,
        layer.input_layernorm.weight,
        own.q_proj.weight,
        own.k_proj.weight,
        own.v_proj.weight,
        own.o_proj.weight,
        None if own.q_norm is None else own.q_norm.weight,
        None if own.k_norm is None else own.k_norm.weight,
        cos,
        sin,
        shape,
    )


def _experts(
    layer: DecoderLayer, x: Tensor, subnet: LayerSubnet, config: ModelConfig
) -> tuple[Tensor, Tensor, training.Routed]:
    moe = layer.mlp
    assert isinstance(moe, MoE)
    pool = torch.zeros(config.num_experts, dtype=torch.bool)
    pool[list(subnet.expert_pool)] = True
    choice = training.ExpertsChoice(
        top_k=subnet.top_k,
        min_experts=subnet.min_experts,
        threshold=subnet.sparsity_threshold,
        width=subnet.expert_width * config.shape.channels_per_granule,
        pool=pool,
        slots=subnet.top_k,
        renormalize=moe.renormalize,
        epsilon=moe.epsilon,
    )
    return training.experts_block(
        x,
        layer.post_attention_layernorm.weight,
        moe.gate.weight,
        moe.experts.gate_proj,
        moe.experts.up_proj,
        moe.experts.down_proj,
        moe.correction_bias,
        choice,
        config.rms_norm_eps,
    )


def can_step(params: Sequence[nn.Parameter]) -> bool:
    """Whether the C++ step of Muon takes these parameters."""
    return bool(native.levels()) and all(
        p.device.type == "cpu"
        and p.dtype == torch.float32
        and training.muon_refusal(p.shape) is None
        for p in params
    )
