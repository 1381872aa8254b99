"""What a super-network cost to train, and each network that comes out of it."""
