"""Looks at models: what is in a folder, and whether two compute the same."""
