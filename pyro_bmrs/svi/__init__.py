"""Fitting by stochastic variational inference."""
