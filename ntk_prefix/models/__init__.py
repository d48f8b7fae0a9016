"""Pretrained backbones in Flax NNX."""
