"""SATFormer, ResFormer and the plain Transformer on Megatron-core, on equal terms."""

__version__ = "0.1.0"
