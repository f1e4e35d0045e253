"""Tiers beside everything on the device, offloading and recomputing: `kvpress bench tiers`."""
