"""Serving many requests: continuous batching beside one by one, and beside transformers' own."""
