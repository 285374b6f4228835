"""The exceptions of the package. All have the base `CaptumGenericAttnError`, and each is also the
built-in exception that fits it, so that `except ValueError` keeps working.

Wrong arguments raise the built-in exceptions (`ValueError`, `TypeError`, `KeyError`) themselves.
"""

from __future__ import annotations


class CaptumGenericAttnError(Exception):
    """Base of all exceptions that this package defines.

    Example:
        >>> import torch
        >>> from captum_generic_attn import CaptumGenericAttnError, GenericAttention
        >>> try:
        ...     GenericAttention(torch.nn.Linear(3, 2)).attribute(torch.zeros(1, 3), target=0)
        ... except CaptumGenericAttnError as error:
        ...     print(type(error).__name__)
        UnsupportedAttentionError
    """


class UnsupportedAttentionError(CaptumGenericAttnError, ValueError):
    """An attention call cannot be explained, or the model has no attention call at all.

    The message names each module, says what was seen there and what can be done.

    Example:
        >>> import torch
        >>> from captum_generic_attn import GenericAttention
        >>> try:
        ...     GenericAttention(torch.nn.Linear(3, 2)).attribute(torch.zeros(1, 3), target=0)
        ... except UnsupportedAttentionError as error:
        ...     print(str(error).split(":")[0])
        no attention was found in the forward pass
    """


class UnsupportedOperationError(CaptumGenericAttnError, ValueError):
    """LRP has no relevance rule for an operation of the model; the message names the operation.

    Example:
        >>> import torch
        >>> from captum_generic_attn import Lrp
        >>> model = lambda x: torch.linalg.inv(x)[:, 0]
        >>> try:
        ...     Lrp(model).attribute(torch.eye(2)[None], target=0)
        ... except UnsupportedOperationError as error:
        ...     print(str(error).split(":")[0])
        linalg_inv has no relevance rule
    """


class UnknownModelError(CaptumGenericAttnError, ValueError):
    """No library has a model of that name; the message lists the nearest names."""


class UnavailableWeightsError(CaptumGenericAttnError, ValueError):
    """The weights of a known model cannot be loaded, or do not fit; the message says what to do."""


class UnreadableImageError(CaptumGenericAttnError, ValueError):
    """A file is not an image, or is damaged; the message names it."""


class PlanError(CaptumGenericAttnError, ValueError):
    """A TOML file of an evaluation is wrong; the message names the key and the values it takes."""


class DataError(CaptumGenericAttnError, ValueError):
    """Images or texts cannot be evaluated; the message says which, and why."""
