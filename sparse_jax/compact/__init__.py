"""The compact tier: training steps whose gradients are never dense."""
