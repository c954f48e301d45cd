"""Variational posteriors of all noise, one family per file."""
