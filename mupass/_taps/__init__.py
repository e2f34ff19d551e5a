"""Taps: the statistics that K-FAC takes from a forward and backward pass."""
