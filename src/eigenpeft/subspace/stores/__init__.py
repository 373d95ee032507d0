"""Stores of adapters in one subspace: their members, their files, and moving them to other bases."""
