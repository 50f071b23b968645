"""Families of models: one file for each."""
