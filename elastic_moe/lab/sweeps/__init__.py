"""A sweep: which sub-networks (grid), on which text, their quality, and the folder of results."""
