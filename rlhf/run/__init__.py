"""The command line, the run folder, and stages that run as processes."""
