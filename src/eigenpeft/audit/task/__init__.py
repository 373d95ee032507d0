"""What the rows of a new task add: its gradients, the nearest adapters, and the chance that training gains."""
