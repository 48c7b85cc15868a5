"""DRIFT: multimodal fine-tuning whose gradients a donor's direction turns (arXiv 2510.15050)."""
