"""Programs to start from; each runs by itself."""
