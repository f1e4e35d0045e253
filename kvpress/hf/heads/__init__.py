"""Retrieval heads: what says, before a decode step begins, which past tokens all layers read."""
