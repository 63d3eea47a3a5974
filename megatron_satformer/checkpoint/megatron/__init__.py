"""Megatron checkpoints: read, written, resumed, and built into a model again."""
