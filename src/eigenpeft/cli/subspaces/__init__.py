"""From adapters to a subspace and what it says: build, inspect, project and audit."""
