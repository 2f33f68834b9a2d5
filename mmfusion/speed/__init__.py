"""How fast a run is, and where the time of its steps goes."""
