"""elastic-mini: the configuration of the bundled super-network."""

from __future__ import annotations

from elastic_moe.model.config import ElasticBlock, ModelConfig

ELASTIC_MINI = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=128,
    num_layers=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=16,
    max_top_k=4,
    expert_hidden=64,
    max_positions=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tied_embeddings=True,
    qk_norm="head",
    renormalize=True,
    elastic=ElasticBlock(width_granules=8),
)
