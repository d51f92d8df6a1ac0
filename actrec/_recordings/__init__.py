"""What was recorded: layers, recordings, their statistics and comparisons."""
