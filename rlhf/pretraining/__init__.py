"""A new tokenizer and a new model from text."""
