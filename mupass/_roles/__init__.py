"""Roles: what the graph says of each parameter, its fans, fusions and uses."""
