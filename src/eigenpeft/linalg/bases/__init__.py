"""From the factors of many adapters of one weight to a pair of bases, at once, in chunks or merged with new rows."""
