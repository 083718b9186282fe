"""Tensors in, tensors out: the operators that the backbones are made of, each with its backends and its cost."""
