"""Optimizers of whole matrices: parameters as stacks of equally shaped blocks."""
