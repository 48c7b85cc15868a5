"""What leaves the house: LoRA adapters, model cards, folders on a hub."""
