"""Optimizers that read their width factors from the plan."""
