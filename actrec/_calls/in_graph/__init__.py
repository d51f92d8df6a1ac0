"""Recording inside compiled code, which stays compiled."""
