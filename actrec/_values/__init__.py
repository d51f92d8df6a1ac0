"""What a layer returned: one tensor, or tensors nested in containers. Depends on PyTorch, not on recordings."""
