"""Imported by the tests' fork server: what each recipe would read once, from the libraries alone."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
