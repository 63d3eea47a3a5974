"""What a machine has and how well it works, before anything is trained on it."""
