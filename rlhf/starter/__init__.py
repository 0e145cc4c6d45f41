"""The model and the data that need no network."""
