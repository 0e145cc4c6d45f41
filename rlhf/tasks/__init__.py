"""Learning from answers that are known: labels, instructions, problems."""
