"""Many requests on one model: they come and go at any step."""
