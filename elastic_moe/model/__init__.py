"""The reference model: configuration, layers, experts, transformer, tokenizer, checkpoints."""
