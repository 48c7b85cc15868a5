"""What a merge costs on paper, and a merge tried before it runs: bytes, operations, memory and time by stage."""
