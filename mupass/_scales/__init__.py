"""Scales: parameterization x optimizer x geometry -> a frozen plan."""
