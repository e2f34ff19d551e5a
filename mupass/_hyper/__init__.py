"""Hypergradients: derivatives of what training arrives at with respect to what it was set to."""
