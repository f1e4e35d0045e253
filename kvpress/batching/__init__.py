"""Many requests on one model: they join and leave the running ones at any step."""
