"""Singular value decompositions of task vectors: computed, checked, stored."""
