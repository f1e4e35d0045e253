"""Which pages are worth reading, and what reading some of them costs: `kvpress bench retrieval`."""
