"""Transformers in Flax NNX: encoders, decoders and their heads."""
