"""The merging rules: one published rule per file, a pure function of cores. Their table is `linalg.merging.registry`."""
