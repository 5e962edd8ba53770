"""Mixture-of-experts kernels in Triton for Qwen3-MoE from quantised GGUF, bit-exact against a numpy reference."""

__version__ = "0.1.0"
