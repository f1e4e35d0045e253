"""The planner: what a cache will hold and what reading takes, before there is a tensor of it."""
