"""Training costs: of a super-network, and of each network extracted from it."""
