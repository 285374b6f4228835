"""Laws that hold for all models: where tokens go, and that nothing is left behind."""
