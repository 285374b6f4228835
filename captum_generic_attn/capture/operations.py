"""Which family of transfers an operation belongs to: one word in one of the lists below.

An operation that stands in no list is taken to act on each token by itself (`Family.TOKENWISE`)
if its result has the shape of what goes in; otherwise tokens are lost there, and an attention call
that this makes unusable names the operation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor


class Family(Enum):
    """What an operation does to tokens."""

    NOTHING = "the result says nothing of the values: sizes, comparisons, constants"
    SAME = "the result is the first argument: casts, copies, norms"
    SHAPE = "elements are moved, not changed: the same operation moves token ids"
    TOKENWISE = "element by element"
    JOIN = "cat, stack"
    PAD = "pad"
    WRITE = "elements of the first argument are replaced"
    REDUCE = "axes are summed away"
    MIX = "tokens are mixed, or moved to where integers cannot follow"
    RESIZE = "a map is resized"
    LINEAR = "the last axis is mixed by a weight"
    WINDOW = "convolution and pooling"
    EMBEDDING = "integers become vectors"
    PRODUCT = "two tensors are multiplied and summed over an axis"
    SOFTMAX = "softmax"
    ATTENTION = "the fused kernel"
    FOREIGN_ATTENTION = "kernels whose probabilities cannot be known"


_LISTS: dict[Family, str] = {
    Family.NOTHING: """
        zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros
        new_ones new_full new_empty new_tensor size dim ndim numel is_floating_point is_complex
        stride item tolist eq ne lt gt le ge isnan isinf isfinite argmax argmin argsort allclose
        equal all any nonzero data_ptr get_device element_size shape dtype device layout
        requires_grad grad grad_fn is_leaf len hash repr format bernoulli
        is_contiguous storage_offset is_cuda names untyped_storage is_nested is_sparse
        is_inference is_meta is_mps is_quantized register_hook retain_grad
        register_post_accumulate_grad_hook""",
    Family.SAME: """
        contiguous clone detach to type type_as float int long short half
        bfloat16 double cpu cuda data real
        layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm normalize
        dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d alias
        local_response_norm resolve_conj resolve_neg""",
    Family.SHAPE: """
        view reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze
        unsqueeze expand expand_as repeat tile chunk split split_with_sizes unbind tensor_split
        getitem narrow select roll flip fliplr flipud index_select gather take_along_dim
        repeat_interleave broadcast_to view_as reshape_as rot90 t T mT H mH adjoint diagonal
        hsplit vsplit dsplit unfold pixel_shuffle pixel_unshuffle slice ravel view_as_complex
        view_as_real channel_shuffle take glu""",
    Family.JOIN: "cat concat concatenate stack hstack vstack dstack column_stack row_stack",
    Family.PAD: "pad constant_pad_nd",
    Family.WRITE: """
        setitem copy masked_scatter index_copy index_put scatter select_scatter
        slice_scatter""",
    Family.REDUCE: """
        mean sum amax amin max min prod std var norm logsumexp nanmean nansum vector_norm median
        var_mean std_mean topk sort kthvalue mode""",
    Family.MIX: """
        cumsum cumprod cummax cummin logcumsumexp fft fft2 fftn ifft ifft2 ifftn rfft rfft2 rfftn
        irfft irfft2 irfftn index_add scatter_add scatter_reduce index_reduce as_strided grid_sample
        grid_sampler conv_transpose1d conv_transpose2d conv_transpose3d fold
        cdist renorm""",
    Family.RESIZE: "interpolate upsample upsample_nearest upsample_bilinear",
    Family.LINEAR: "linear",
    Family.WINDOW: """
        conv1d conv2d conv3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d""",
    Family.EMBEDDING: "embedding",
    Family.PRODUCT: "matmul rmatmul bmm mm mv baddbmm addmm addbmm addmv einsum",
    Family.SOFTMAX: "softmax _softmax special_softmax _safe_softmax",
    Family.ATTENTION: "scaled_dot_product_attention",
}
_FAMILIES = {name: family for family, names in _LISTS.items() for name in names.split()}
_FOREIGN_ATTENTION = re.compile(
    r"flash_attn|flex_attention|efficient_attention|varlen_attn|flash_attention"
    r"|_fused_sdp|native_multi_head|transformer_encoder_layer_fwd|sage_?attn"
)
_REFLECTED = {"radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow", "iadd", "isub", "imul", "idiv"}
_REFLECTED |= {"itruediv", "ipow", "rfloordiv", "ifloordiv", "rmod", "imod"}


def names_of(*families: Family) -> list[str]:
    """The names in the lists of some families."""
    return [name for family in families for name in _LISTS[family].split()]


def canonical(function: object) -> tuple[str, bool]:
    """The plain name of an operation, and whether it works in place.

    Example:
        >>> import torch
        >>> canonical(torch.Tensor.__radd__), canonical(torch.Tensor.add_)
        (('add', False), ('add', True))
        >>> canonical(torch.Tensor.mT.__get__)
        ('mT', False)
    """
    name: str = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    name = name.split(".")[0].removeprefix("fft_")
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in _REFLECTED:
            return name[1:], name[0] == "i"
        return name, name == "setitem"
    if name.endswith("_") and not name.startswith("_"):
        return name[:-1], True
    return name, False


def family_of(name: str) -> Family:
    """The family of an operation by its plain name."""
    if _FOREIGN_ATTENTION.search(name):
        return Family.FOREIGN_ATTENTION
    return _FAMILIES.get(name, Family.TOKENWISE)


class Operation(NamedTuple):
    """One call of a torch function: what went in, what came out."""

    name: str
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: Sequence[Tensor]
    results: Sequence[Tensor]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by place or by name."""
        return argument(self.args, self.kwargs, position, name, default)


def argument(
    args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None
) -> Any:
    """An argument of a call that may be given by place or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def tensors_in(value: object, depth: int = 0) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if depth > 3 or isinstance(value, str):
        return []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            found += tensors_in(item, depth + 1)
    return found


def on_cpu(value: Any) -> Any:
    """An argument as an operation on planes takes it: tensors detached, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) in (list, tuple):
        return type(value)(on_cpu(item) for item in value)
    return value
