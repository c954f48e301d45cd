"""Training loops of one's own: short programs to start from."""
