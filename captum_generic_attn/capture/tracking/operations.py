"""Which family of transfers an operation belongs to: one word in one of the lists below.

An operation that stands in no list is `Family.UNKNOWN`: whether it treats each token by itself is
probed with its own gradient (`probe`). If it does not, or has no gradient, tokens are lost there,
and an attention call that this makes unusable names the operation.
"""

from __future__ import annotations

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
    CHOICE = "elements are chosen along an axis; the second result says which"
    SCATTER = "elements are added to places that an index names"
    ONE_HOT = "integers become rows of zeros and a one"
    MIX = "tokens are mixed, or moved to where integers cannot follow"
    RESIZE = "a map is resized"
    LINEAR = "the last axis is mixed by a weight"
    WINDOW = "convolution and pooling"
    EMBEDDING = "integers become vectors"
    PRODUCT = "two tensors are multiplied and summed over an axis"
    SOFTMAX = "softmax"
    FOREIGN_ATTENTION = "kernels whose probabilities cannot be known"
    UNKNOWN = "in no list: probed"


_LISTS: dict[Family, str] = {
    Family.NOTHING: """
        zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros
        new_ones new_full new_empty new_tensor size dim ndim numel is_floating_point is_complex
        stride item tolist eq ne lt gt le ge isnan isinf isfinite argmax argmin argsort allclose
        equal all any nonzero data_ptr get_device element_size shape dtype device layout
        requires_grad grad grad_fn is_leaf len hash repr format bernoulli
        is_contiguous storage_offset is_cuda names untyped_storage is_nested is_sparse
        is_inference is_meta is_mps is_quantized register_hook retain_grad
        register_post_accumulate_grad_hook _assert _is_all_true _is_any_true contains isin
        bincount histc unique unique_consecutive multinomial""",
    Family.SAME: """
        contiguous clone detach to type type_as float int long short half
        bfloat16 double cpu cuda data real
        layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm normalize
        dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d alias
        local_response_norm resolve_conj resolve_neg
        log_softmax _log_softmax special_log_softmax""",
    Family.SHAPE: """
        view reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze
        unsqueeze expand expand_as repeat tile chunk split split_with_sizes unbind tensor_split
        getitem index narrow select roll flip fliplr flipud index_select gather take_along_dim
        repeat_interleave broadcast_to view_as reshape_as rot90 t T mT H mH adjoint diagonal
        hsplit vsplit dsplit unfold im2col pixel_shuffle pixel_unshuffle slice ravel view_as_complex
        view_as_real channel_shuffle take glu""",
    Family.JOIN: "cat concat concatenate stack hstack vstack dstack column_stack row_stack",
    Family.PAD: "pad constant_pad_nd",
    Family.WRITE: """
        setitem copy masked_scatter index_copy index_put scatter select_scatter
        slice_scatter""",
    Family.TOKENWISE: """
        add sub subtract mul multiply div divide true_divide truediv floordiv floor_divide
        remainder mod fmod rsub pow float_power neg negative positive abs absolute sign sgn
        exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal xlogy special_xlogy
        special_xlog1py sin cos tan asin acos atan atan2 arctan2 sinh cosh tanh asinh acosh atanh
        sinc special_sinc erf erfc erfinv special_erf special_erfc special_erfinv special_ndtr
        special_expit sigmoid logit special_logit logsigmoid relu relu6 gelu silu mish elu
        selu celu leaky_relu prelu rrelu softplus softsign hardtanh hardswish hardsigmoid
        tanhshrink softshrink hardshrink threshold clamp clamp_min clamp_max clip
        maximum minimum fmax fmin where masked_fill index_fill lerp addcmul addcdiv nan_to_num
        floor ceil round trunc fix frac deg2rad rad2deg hypot logaddexp logaddexp2 copysign
        heaviside ldexp nextafter digamma lgamma polygamma i0 special_i0 special_i1 bitwise_and
        bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift and or xor invert
        lshift rshift logical_and logical_or logical_xor logical_not bool searchsorted bucketize
        polar complex conj conj_physical angle imag fill zero uniform normal exponential
        fake_quantize_per_tensor_affine tril triu _weight_norm""",
    Family.CHOICE: "topk sort kthvalue",
    Family.SCATTER: "index_add scatter_add scatter_reduce index_reduce",
    Family.ONE_HOT: "one_hot",
    Family.REDUCE: """
        mean sum amax amin max min prod std var norm logsumexp nanmean nansum vector_norm median
        var_mean std_mean mode linalg_norm linalg_vector_norm""",
    Family.MIX: """
        cumsum cumprod cummax cummin logcumsumexp fft fft2 fftn ifft ifft2 ifftn rfft rfft2 rfftn
        irfft irfft2 irfftn hfft ihfft as_strided grid_sample grid_sampler fold col2im renorm""",
    Family.RESIZE: "interpolate upsample upsample_nearest upsample_bilinear",
    Family.LINEAR: "linear",
    Family.WINDOW: """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d
        avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d""",
    Family.EMBEDDING: "embedding",
    Family.PRODUCT: """
        matmul rmatmul linalg_matmul bmm mm mv baddbmm addmm addbmm addmv einsum tensordot inner
        linalg_vecdot cdist""",
    Family.SOFTMAX: "softmax _softmax special_softmax _safe_softmax softmin",
}
_FAMILIES = {name: family for family, names in _LISTS.items() for name in names.split()}
NORMS = {
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm", "normalize",
    "log_softmax", "_log_softmax", "special_log_softmax",
}  # fmt: skip
"""What subtracts or divides by statistics of its operand along some axes."""


def normed_axes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> list[int]:
    """The axes along which a norm takes its statistics.

    Example:
        >>> normed_axes("normalize", (None, 2.0, -1), {}, 3), normed_axes("group_norm", (), {}, 4)
        ([2], [1, 2, 3])
    """
    if name in ("group_norm", "instance_norm"):
        return list(range(1, ndim))
    if name in ("layer_norm", "rms_norm", "native_layer_norm"):
        shape = argument(args, kwargs, 1, "normalized_shape", ())
        return list(range(ndim - len(shape), ndim))
    axis = argument(args, kwargs, 2 if name == "normalize" else 1, "dim", 1)
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    return [a % ndim for a in axes if isinstance(a, int)]


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
    """The family of an operation by its plain name.

    Example:
        >>> family_of("gelu").name, family_of("lstm").name
        ('TOKENWISE', 'UNKNOWN')
    """
    return _FAMILIES.get(name, Family.UNKNOWN)


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
    """An argument as an operation on token ids takes it: tensors detached, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) in (list, tuple):
        return type(value)(on_cpu(item) for item in value)
    return value
