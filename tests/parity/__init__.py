"""Parity with the outputs of the code of the authors of the papers."""
