"""Samplers: which layers are trained at an update, one file for each rule."""
