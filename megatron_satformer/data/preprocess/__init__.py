"""Documents to indexed data sets: workers, what survives a kill, and the end of a run."""
