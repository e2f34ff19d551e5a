"""Studies: train resized copies of one model, and say how its updates and its best settings move with width."""
