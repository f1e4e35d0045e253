"""Which tokens a policy kept, shown in the text: `kvpress view`."""
