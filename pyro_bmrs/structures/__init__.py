"""What can be removed from a network, what it costs, and its removal."""
