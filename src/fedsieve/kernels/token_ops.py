"""The operations of the native library on tokens: those of ``native/abi.h``, as in ``abi``."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

from fedsieve.kernels.abi import FeatureMap, MapPointer, Operation, fields_of


class LayerNormOp(Operation):
    """LayerNorm or RMSNorm of tokens."""

    kind = 23
    _fields_ = fields_of(
        (FeatureMap, "x out"), (c_void_p, "gamma beta mean invstd"), (c_float, "eps"), (c_int32, "rms")
    )


class LayerNormBackwardOp(Operation):
    """The gradients of a LayerNormOp."""

    kind = 24
    _fields_ = fields_of((LayerNormOp, "of"), (FeatureMap, "grad grad_x"), (c_void_p, "grad_gamma grad_beta"))


class AttentionOp(Operation):
    """Attention of the tokens of each sample, by heads."""

    kind = 25
    _fields_ = fields_of(
        (FeatureMap, "q k v out"),
        (c_void_p, "logsum bias keep"),
        (c_int64, "bias_sample bias_head"),
        (c_int32, "samples length keys heads kv_heads size causal"),
        (c_float, "scale factor"),
    )


class AttentionBackwardOp(Operation):
    """The gradients of an AttentionOp."""

    kind = 26
    _fields_ = fields_of((AttentionOp, "of"), (FeatureMap, "grad grad_q grad_k grad_v"))


class EmbeddingOp(Operation):
    """Rows of a table, as tokens; added to others or not."""

    kind = 27
    _fields_ = fields_of((FeatureMap, "out"), (MapPointer, "add"), (c_void_p, "table row"), (c_int64, "tokens"))


class EmbeddingBackwardOp(Operation):
    """The gradient of an EmbeddingOp's table."""

    kind = 28
    _fields_ = fields_of(
        (FeatureMap, "grad"), (c_void_p, "grad_table row"), (c_int64, "tokens rows padding"), (c_int32, "clear")
    )


class RearrangeOp(Operation):
    """Tokens in other places, or sums of them."""

    kind = 29
    _fields_ = fields_of(
        (FeatureMap, "in_ out"), (c_void_p, "source"), (c_int64, "count"), (c_int32, "scatter"), (c_float, "scale")
    )


class TokenPackOp(Operation):
    """Numbers of a tensor to tokens, or back."""

    kind = 30
    _fields_ = fields_of(
        (FeatureMap, "map"), (c_void_p, "plain token channel"), (c_int64, "tokens"), (c_int32, "unpack")
    )


class TokenLossOp(Operation):
    """The mean cross-entropy of tokens, and its gradient."""

    kind = 31
    _fields_ = fields_of((FeatureMap, "logits grad"), (c_void_p, "label loss each"), (c_int64, "tokens ignored"))


class MultiplyOp(Operation):
    """A product of each number with another."""

    kind = 32
    _fields_ = fields_of((FeatureMap, "a b out"), (c_int32, "accumulate"))


class CombinationOp(Operation):
    """Sums of channels, each times a number for each place in a sequence."""

    kind = 33
    _fields_ = fields_of(
        (FeatureMap, "in_ out"), (c_void_p, "table source row"), (c_int64, "length stride"), (c_int32, "terms")
    )
