"""Turn a random OLMoE checkpoint into bf16 GGUF: to_gguf.py FOLDER OUT.gguf. Under build/peers.

It has no tokenizer, which llama.cpp's own converter would ask for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

FLOAT32 = ("norm.weight", "gate_inp.weight")  # as llama.cpp wants them


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(out, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor) -> None:
        if name.endswith(FLOAT32):
            writer.add_tensor(name, tensor.float().numpy())
            return
        halves = tensor.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8)
        rows = halves.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def experts(prefix: str, part: str) -> torch.Tensor:
        """(E, ., .) of one part, however the checkpoint stores it."""
        fused = f"{prefix}experts.gate_up_proj"
        if fused in tensors:
            if part == "down":
                return tensors[f"{prefix}experts.down_proj"]
            gate, up = tensors[fused].chunk(2, dim=1)
            return gate if part == "gate" else up
        return torch.stack(
            [
                tensors[f"{prefix}experts.{e}.{part}_proj.weight"]
                for e in range(config["num_experts"])
            ]
        )

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    add("output.weight", tensors["lm_head.weight"])
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}."
        for there, here in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("ffn_gate_inp", "mlp.gate"),
        ):
            add(f"{theirs}{there}.weight", tensors[f"{ours}{here}.weight"])
        for part in ("gate", "up", "down"):
            add(f"{theirs}ffn_{part}_exps.weight", experts(f"{ours}mlp.", part))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
