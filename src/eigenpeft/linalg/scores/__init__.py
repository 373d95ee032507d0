"""How well bases hold adapters and gradients that they were not made from, beside chance."""
