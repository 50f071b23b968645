"""Supports: which entries of an array are trained, how they are chosen and reached."""
