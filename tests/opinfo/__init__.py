"""PyTorch's own sample inputs for its operations (OpInfo), run through the bridge."""
