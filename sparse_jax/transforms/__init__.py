"""Optax gradient transformations, one file for each."""
