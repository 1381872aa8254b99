"""A loaded checkpoint as the C++ kernels want it."""

from __future__ import annotations

import torch
from elastic_moe_kernels.step import CpuModel
from elastic_moe_kernels.weights import Experts, LayerTensors, ModelDims, packed_bytes

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.layers import MLP, rotary_angles
from elastic_moe.model.moe import Experts as Routed
from elastic_moe.model.moe import MoE
from elastic_moe.model.transformer import DecoderLayer, ElasticTransformer


def model_dims(config: ModelConfig) -> ModelDims:
    """What the kernels need to know of a configuration."""
    return ModelDims(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        expert_hidden=config.expert_hidden,
        rms_norm_eps=config.rms_norm_eps,
        qk_norm=config.qk_norm,
        rope=config.rope,
        renormalize=config.renormalize,
        routing_epsilon=config.routing_epsilon,
    )


def pack_model(model: ElasticTransformer, level: str | None = None) -> CpuModel:
    """Pack a loaded model for the C++ step; `model` keeps its weights."""
    config = model.config
    dims = model_dims(config)
    dtype = torch.bfloat16 if model.input_dtype == torch.bfloat16 else torch.float32
    packed = CpuModel(dims, dtype, level)
    everyone = [
        config.dense_hidden if i in config.dense_layers else config.shared_hidden
        for i in range(config.num_layers)
    ]
    packed.reserve(
        packed_bytes(dims, dtype, [(i in config.moe_layers, n) for i, n in enumerate(everyone)])
    )
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        packed.set_layer(i, layer_tensors(layer))
    packed.set_ends(model.embed_tokens.weight, model.norm.weight, head.weight)
    positions = torch.arange(config.max_positions)
    packed.set_angles(*rotary_angles(positions, config.head_dim, config.rope_theta))
    return packed


def layer_tensors(layer: DecoderLayer) -> LayerTensors:
    """One layer's weights under the kernels' names."""
    attention = layer.self_attn
    moe = layer.mlp if isinstance(layer.mlp, MoE) else None
    everyone = layer.mlp if moe is None else moe.shared_experts
    return LayerTensors(
        attention_norm=layer.input_layernorm.weight,
        q=attention.q_proj.weight,
        k=attention.k_proj.weight,
        v=attention.v_proj.weight,
        out=attention.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        q_norm=None if attention.q_norm is None else attention.q_norm.weight,
        k_norm=None if attention.k_norm is None else attention.k_norm.weight,
        router=None if moe is None else moe.gate.weight,
        correction_bias=None if moe is None else moe.correction_bias,
        experts=None if moe is None else _stacked(moe.experts),
        everyone=_as_expert(everyone) if isinstance(everyone, MLP) else None,
    )


def _stacked(experts: Routed) -> Experts:
    return Experts(experts.gate_proj, experts.up_proj, experts.down_proj)


def _as_expert(mlp: MLP) -> Experts:
    return Experts(
        mlp.gate_proj.weight.unsqueeze(0),
        mlp.up_proj.weight.unsqueeze(0),
        mlp.down_proj.weight.unsqueeze(0),
    )
