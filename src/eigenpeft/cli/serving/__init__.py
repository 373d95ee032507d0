"""Many adapters in one place: store and sync-adapters."""
