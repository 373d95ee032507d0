"""Plain LoRA adapters that start at what is known: principal components, or an adapter that exists."""
