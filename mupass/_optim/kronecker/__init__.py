"""Kronecker-factored curvature: factors of many layers in stacks, damped, inverted and applied."""
