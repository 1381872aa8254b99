"""The training text: corpus, tokenizer, batches."""
