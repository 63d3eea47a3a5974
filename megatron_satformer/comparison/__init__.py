"""Architectures trained on equal terms, and what their differences are worth."""
