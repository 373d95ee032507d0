"""The reward model as an artifact: model, users, files, card."""
