"""A sweep: grid, quality, text, results."""
