"""Native CPU kernels that skip zeros: compiled at installation (``build``), loaded when first used (``library``)."""
