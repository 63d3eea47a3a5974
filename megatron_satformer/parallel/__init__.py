"""How carried state crosses pipeline stages. Must not know: gates, training, files."""
