"""Retrieval heads: trained on a target's attention, and measured."""
