"""Sharding: one model over many devices, and a step for them."""
