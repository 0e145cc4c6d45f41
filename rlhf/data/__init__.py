"""Any dataset → conversations, prompts or preference pairs, and their token ids."""
