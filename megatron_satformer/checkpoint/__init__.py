"""Moves models between Megatron checkpoints and Hugging Face folders; must not know training."""
