"""Linear algebra of batches of symmetric and other matrices: roots, polar factors, norms, packing."""
