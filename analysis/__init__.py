"""What people run, from a checkout: python -m analysis.quickstart."""
