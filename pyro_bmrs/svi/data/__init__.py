"""Data of any kind, batch by batch."""
