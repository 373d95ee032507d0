"""Artifacts on disk and on the Hub: written whole, verified, pushed."""
