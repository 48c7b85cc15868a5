"""LoRA adapters, FP8 checkpoints, model cards, and uploads to a hub."""
