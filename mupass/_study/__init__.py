"""Studies: train resized copies of one model, and see what moves with width: updates, best settings."""
