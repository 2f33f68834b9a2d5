"""A user's tables and photos into shards: staged, checked, and written by one map over the shards."""
