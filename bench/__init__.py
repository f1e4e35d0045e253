"""Measurements: what `kvpress run` and `kvpress bench` call."""
