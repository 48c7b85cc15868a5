"""A dial between the VLM and the model with its gates: both answer side by side, from one copy of the weights."""
