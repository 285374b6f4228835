"""Is a map right on this model? `verify`, with one function for each check, and their report.

Each check compares what a capture says of a model (attention, tokens, explained rows, elements that
are read) with derivatives of the model itself. `subject` is what they check: a method, a batch and
a target. `report` holds the results.
"""

from captum_generic_attn.verification.report import Check, Status, Verification
from captum_generic_attn.verification.verifying import verify

__all__ = ["Check", "Status", "Verification", "verify"]
