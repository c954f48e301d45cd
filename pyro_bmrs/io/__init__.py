"""Networks, models and runs on disk."""
