"""Named records in a folder or in memory: the log, its index, and what can be asked of either."""
