"""Where pages are: so far on the device of their layer."""
