"""The predicted cost of a merge, and its dry run: bytes, operations, memory and time by stage."""
