"""Tool calls: what a request may call, schemas of arguments, calls found in a text."""
