"""The posterior in numbers and pictures."""
