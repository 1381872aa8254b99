"""Which sub-network a request gets: its own wish, profiles, the operator's limits."""
