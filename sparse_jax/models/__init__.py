"""The encoder models: BERT and RoBERTa, in Flax NNX."""
