"""From text to features and rewards."""
