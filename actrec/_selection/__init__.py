"""Which layers: queries, and why a module cannot be recorded."""
