"""Architectures whose width geometry is known, in modules by the package that they need."""
