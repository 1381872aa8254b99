"""The training text: corpus, tokenizer, batches."""

PIECE_TOKENS = 512  # the unit of a step's text
