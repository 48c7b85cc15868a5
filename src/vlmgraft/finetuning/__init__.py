"""DRIFT: multimodal fine-tuning whose gradients are biased towards a donor (arXiv 2510.15050)."""
