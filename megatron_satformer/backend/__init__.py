"""The device Megatron runs on when there is no GPU."""
