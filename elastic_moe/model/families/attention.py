"""The keys that all families share: sizes of the embedding, attention and positions."""

from __future__ import annotations

from typing import Any

from elastic_moe.model.families.config_keys import MAX_LAYERS, ConfigKeys


def attention_sizes(
    keys: ConfigKeys, *, rms_norm_eps: float, rope_theta: float, tied: bool = False
) -> dict[str, Any]:
    """Fields of `ModelConfig` that every family says alike; the arguments are its defaults."""
    hidden_size, heads = keys.size("hidden_size"), keys.size("num_heads")
    # A null count of key/value heads means one for each query head.
    kv_heads = keys.get(keys.key("num_kv_heads"), 0)
    head_dim = keys.get(keys.key("head_dim"), 0)
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": keys.size("num_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else keys.size("num_kv_heads"),
        "head_dim": hidden_size // heads if head_dim in (0, None) else keys.size("head_dim"),
        "max_positions": keys.size("max_positions"),
        "rope_theta": keys.rope_theta(rope_theta),
        "rms_norm_eps": keys.number(keys.key("rms_norm_eps"), rms_norm_eps),
        "tied_embeddings": keys.flag(keys.key("tied_embeddings"), tied),
    }
