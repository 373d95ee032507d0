"""What the adapters alone say: likeness to each other and to chance, module by module, and what compressing costs."""
