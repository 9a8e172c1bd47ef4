"""The operations of the native library on one token: those of ``native/abi.h``, as in ``abi``."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

from fedsieve.kernels.abi import Operation, fields_of


class SlicedLinearOp(Operation):
    """A linear layer, its non-zeros in slices of 16 rows."""

    kind = 34
    _fields_ = fields_of((c_void_p, "x y start index value order bias"), (c_int64, "rows"))


class VectorNormOp(Operation):
    """LayerNorm or RMSNorm."""

    kind = 35
    _fields_ = fields_of((c_void_p, "x out gamma beta"), (c_int64, "channels"), (c_int32, "rms"), (c_float, "eps"))


class CachedAttentionOp(Operation):
    """Attention with the keys and values of earlier tokens."""

    kind = 36
    _fields_ = fields_of(
        (c_void_p, "q k v out keys values position bias"),
        (c_int64, "room bias_head"),
        (c_int32, "heads kv_heads size"),
        (c_float, "scale"),
    )


class TableRowOp(Operation):
    """A row of a table, and another value times a number."""

    kind = 37
    _fields_ = fields_of((c_void_p, "x out table row position"), (c_int64, "channels"), (c_float, "scale"))


class VectorCombinationOp(Operation):
    """Sums of channels, each times a number for each position."""

    kind = 38
    _fields_ = fields_of((c_void_p, "x out table source position"), (c_int64, "channels terms"))
