"""Tokenizers by Megatron's flags, their fast equal, and training them."""
