"""FRISM's second stage: gates learned by self-distillation, under a budget of KL divergence if one is given."""
