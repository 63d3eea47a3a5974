"""What training asks of its data: blends, samples, checks before the start, the index cache."""
