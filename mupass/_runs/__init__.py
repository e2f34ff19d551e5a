"""Training runs of resized copies of a model: data, copies, optimizers, jobs, and what is kept of them."""
