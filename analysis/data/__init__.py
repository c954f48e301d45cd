"""Data sets: found, downloaded, decoded and split."""
