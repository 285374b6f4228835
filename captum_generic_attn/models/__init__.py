"""Models by name for the command line and for evaluations: kinds, checkpoints, preprocessing."""
