"""TokenTracker functions: what each family of operations does to abstract values.

Each takes the state of the forward pass and an operation, and returns the value of each result in
order; `None` for a result that carries none.
"""

from collections.abc import Sequence
from typing import TypeAlias

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue

Values: TypeAlias = Sequence[AbstractValue | None]
