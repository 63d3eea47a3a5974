"""Input files to documents."""
