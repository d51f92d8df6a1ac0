"""What was recorded: layers, recordings, and what can be said of them."""
