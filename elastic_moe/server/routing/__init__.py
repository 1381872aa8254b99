"""The sub-network that a request runs: its own routing, profiles, the operator's limits."""
