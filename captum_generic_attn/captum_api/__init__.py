"""Captum's contract: inputs, targets and batches in parts.

The only folder that imports private functions of Captum.
"""
