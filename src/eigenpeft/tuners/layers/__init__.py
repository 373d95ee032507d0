"""Factor modules for each kind of layer, and the bases that they share."""
