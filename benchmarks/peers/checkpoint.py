"""Make a random bf16 OLMoE checkpoint: checkpoint.py FOLDER standard|awkward. Under build/peers.

"standard" is the case that all figures are about; "awkward" has sizes that no kernel likes: prime
or odd numbers of experts, of experts per token, and of vectors and panels per row.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "standard": {
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "awkward": {
        "hidden_size": 1000,
        "intermediate_size": 520,
        "num_attention_heads": 20,  # heads of 50
        "num_key_value_heads": 20,
        "num_experts": 61,
        "num_experts_per_tok": 5,
    },
}


def main() -> None:
    folder, name = sys.argv[1:3]
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32000,
        num_hidden_layers=8,
        max_position_embeddings=4096,
        norm_topk_prob=False,
        eos_token_id=1,
        **SIZES[name],
    )
    model = OlmoeForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


main()
