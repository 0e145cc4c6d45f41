"""Learning from known answers: labels, instructions, problems."""
