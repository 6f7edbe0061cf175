"""What flows through a model while it runs: hooks on attention, features and weights, for any PyTorch model."""
