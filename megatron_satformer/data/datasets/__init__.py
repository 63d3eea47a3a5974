"""Megatron's indexed data sets on disk: format, manifest, merging, verifying."""
