"""Text to tokens to indexed files, and the checks before training reads them.

This room knows files and tokenizers. It knows nothing of models, parallelism or training, and
importing it imports neither torch nor Megatron: a data tool starts in a fraction of a second.
"""
