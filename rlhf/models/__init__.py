"""Where models come from, how they are loaded, and how they run."""
