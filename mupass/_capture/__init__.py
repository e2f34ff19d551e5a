"""Capture: a model as a graph of ATen operators, by export or by recording one run."""
