"""Several runs: which there are, what of them goes to W&B, and which may go."""
