"""A tokenizer and a model from nothing but text."""
