"""Sparse prompt attention beside PyTorch's, on what the layers of a real model hand over."""
