"""Resize: the same architecture at another width, from one model."""
