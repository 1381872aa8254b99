"""Tool calls: options of a request, schemas that force calls, a parser of text, messages."""
