"""From logits to text: sampler, JSON grammars, detokenizer."""
