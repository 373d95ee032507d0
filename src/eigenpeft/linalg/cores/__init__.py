"""Updates of one weight as cores on common axes: the axes, their moments, and the parts of a core."""
