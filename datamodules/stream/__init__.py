"""Shards into batches: read, counted when they fail, and joined in the plan's order."""
