"""Where shards lie: a folder, or an address behind a local cache."""
