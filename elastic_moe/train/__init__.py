"""Training a super-network: corpus, sub-network sampling, loss, optimiser, loop, checkpoints.

Needs torch, numpy and tokenizers only. `python -m elastic_moe.train` runs it.
"""
