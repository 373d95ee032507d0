"""Tables, plots and their plain-data twins for people who read results."""
