"""Distributed MoE parallelism for PyTorch."""
