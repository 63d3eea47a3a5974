"""Between the kinds of folder: Megatron's, Hugging Face's, the paper's."""
