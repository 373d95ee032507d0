"""Many adapters in one place: store, predict and sync-adapters."""
