"""Exact attention with a flash backward pass and a forward-mode tangent fused into the forward pass."""

from pallas_kernels.attention import attention, attention_given

__all__ = ["attention", "attention_given"]
