"""A network as a Pyro model: its noise, placed inside or attached from outside, and its guides."""
