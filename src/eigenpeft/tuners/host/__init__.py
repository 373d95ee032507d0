"""What meets PEFT: registration, the shared model class, mixed models, cards."""
