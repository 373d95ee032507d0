"""Fitting a reward model to comparisons."""
