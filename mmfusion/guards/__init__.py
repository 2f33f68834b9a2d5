"""What stops a run that would go wrong, or waste its machines in silence: one guard a file."""
