"""From one adapter or many to one that others read: export, convert, merge and merge-base."""
