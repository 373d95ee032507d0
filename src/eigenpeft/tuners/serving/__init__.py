"""Many adapters on one base model, mixed within a batch."""
