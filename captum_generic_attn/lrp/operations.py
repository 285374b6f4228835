"""The kind of each operation of PyTorch, which decides on its relevance rule.

The lists below hold the names of the operations. An operation without an entry is refused by name:
token tracking has a default, relevance has none.
"""

from __future__ import annotations

from enum import Enum

from captum_generic_attn.capture.tracking.operations import Family, names_of


class Kind(Enum):
    """How an operation propagates relevance."""

    NOTHING = "its result says nothing of the values: sizes, comparisons"
    STATISTIC = "its result is taken as a constant"
    MOVED = "elements are moved or chosen: each has the relevance of where it went"
    PICKED = "as moved; the authors' code divides what is picked by itself"
    PASSED = "element by element, from one operand: relevance stays where it is"
    NORM = "layer norms"
    SOFTMAX = "softmax"
    WEIGHTED = "linear in an operand, with a weight"
    PRODUCT = "a product of matrices"
    MULTIPLIED = "a product element by element"
    DIVIDED = "a quotient: relevance is its numerator's"
    ADDED = "a sum of two"
    POOLED = "linear, without a weight: means, sums, resizing"
    GATED = "half of the operand gates the other"
    EMBEDDED = "integers become vectors"
    UNKNOWN = "no rule"


_ON_COMPLEX = {"view_as_complex", "view_as_real"}  # complex arithmetic mixes pairs of elements
_MOVING = [
    name
    for name in names_of(Family.SHAPE, Family.JOIN, Family.PAD, Family.WRITE)
    if name not in _ON_COMPLEX
]
_LISTS: dict[Kind, str] = {
    Kind.NOTHING: f"""
        {" ".join(names_of(Family.NOTHING))} detach _assert set_grad_enabled _set_grad_enabled
        is_complex backward requires_grad data _base""",
    Kind.STATISTIC: """
        sign floor ceil round trunc floordiv isin bool int long short sqrt rsqrt std var var_mean
        std_mean norm vector_norm matrix_norm logsumexp linalg_norm linalg_vector_norm
        logical_not logical_and logical_or and or xor invert searchsorted bucketize unique
        bincount histc""",
    Kind.MOVED: f"""
        {" ".join(_MOVING)} contiguous clone to type type_as float half bfloat16 double cpu cuda
        alias resolve_conj resolve_neg masked_fill where max_pool1d max_pool2d max_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min topk sort
        kthvalue maximum minimum im2col masked_select diag_embed tril triu block_diag fill""",
    Kind.PICKED: "select index_select gather",
    Kind.PASSED: """
        relu relu6 gelu silu swish mish elu selu celu leaky_relu prelu rrelu softplus softsign
        hardtanh hardswish hardsigmoid tanhshrink softshrink hardshrink threshold log_sigmoid tanh
        sigmoid erf exp expm1 log log1p pow square clamp clip neg abs dropout alpha_dropout
        feature_dropout dropout1d dropout2d dropout3d nan_to_num sin cos positive tan
        log_softmax softcap reciprocal sinc atan logit erfinv""",
    Kind.NORM: """
        layer_norm group_norm batch_norm instance_norm rms_norm normalize
        local_response_norm""",
    Kind.SOFTMAX: " ".join(names_of(Family.SOFTMAX)),
    Kind.WEIGHTED: """
        linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    Kind.PRODUCT: " ".join(names_of(Family.PRODUCT)),
    Kind.MULTIPLIED: "mul multiply",
    Kind.DIVIDED: "div divide true_divide truediv",
    Kind.ADDED: "add sub subtract",
    Kind.POOLED: """
        mean sum nanmean nansum cumsum interpolate upsample upsample_nearest upsample_bilinear
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d fold grid_sample index_add scatter_add""",
    Kind.GATED: "glu",
    Kind.EMBEDDED: "embedding",
}
_KINDS = {name: kind for kind, names in _LISTS.items() for name in names.split()}


def kind_of(name: str) -> Kind:
    """The kind of an operation, by its canonical name.

    Example:
        >>> kind_of("gelu").name, kind_of("linalg_solve").name
        ('PASSED', 'UNKNOWN')
    """
    return _KINDS.get(name, Kind.UNKNOWN)
