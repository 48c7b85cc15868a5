"""Checkpoints on disk: an index from headers alone, lazy reading, streamed writing that is published by rename."""
