"""`--plan true`: what a run will need, from its own passes over tensors without data."""
