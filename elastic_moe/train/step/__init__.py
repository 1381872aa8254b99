"""One training step and the loop over them: plan, sub-network sampling, loss, optimiser."""
