"""What trains: lore, recycle and the scripts of TRL."""
