"""From data sets as they are published to shards; one file each, registered in pyproject as `mmfusion.importers`."""
