"""The equation and the modules. Must not know: pipeline boundaries, training, files."""
