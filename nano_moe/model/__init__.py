"""Tensors only: attention, FFNs, routing, balancing, the decoder."""
