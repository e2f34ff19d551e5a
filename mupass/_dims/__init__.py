"""Dimension inference: a term for every axis of every tensor, and a verdict for every term."""
