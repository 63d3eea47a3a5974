"""Hugging Face folders: weights, tokenizer, card, and which models are ours."""
