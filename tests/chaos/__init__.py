"""Two ranks that are killed by SIGKILL again and again, and go on with --resume=auto, end as those that were not."""
