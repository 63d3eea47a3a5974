"""What a trained model does: loss curves, gates, samples, baselines.

This room reads exported Hugging Face folders, event files, logs and indexed data. It knows nothing
of Megatron or of how training is run.
"""
