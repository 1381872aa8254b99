"""What a training step on the CPU is made of, forward and backward, in few native calls.

`attention_block` is x + attention(norm(x)), `experts_block` is x + experts(norm(x)) of one
sub-network with the balance of its experts, `head_loss` the cross-entropy behind the head; all are
differentiable. `muon_step` is the optimiser's. float32 throughout, and the same bits on any number
of threads. The model's own modules compute the same in plain PyTorch and are what these are tested
against.
"""

from elastic_moe_kernels.training.attention import AttentionShape, attention_block
from elastic_moe_kernels.training.checks import refusal
from elastic_moe_kernels.training.experts import ExpertsChoice, Routed, experts_block
from elastic_moe_kernels.training.head import head_loss
from elastic_moe_kernels.training.muon import muon_refusal, muon_step

__all__ = [
    "AttentionShape",
    "ExpertsChoice",
    "Routed",
    "attention_block",
    "experts_block",
    "head_loss",
    "muon_refusal",
    "muon_step",
    "refusal",
]
