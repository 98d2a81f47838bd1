"""Exact attention with a flash backward pass and a forward-mode tangent fused into the forward pass."""

from pallas_kernels.attention import BackEnd, attention, attention_given, choose_back_end

__all__ = ["BackEnd", "attention", "attention_given", "choose_back_end"]
