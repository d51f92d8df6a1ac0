"""What a layer returned: one tensor, or tensors nested in containers. Knows PyTorch, and nothing of recordings."""
