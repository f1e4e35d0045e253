"""Pages and pictures of what was measured: `kvpress report` and `kvpress plot`."""
