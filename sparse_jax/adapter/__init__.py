"""Adapters: what was trained, as a file, on its base, and for PEFT."""
