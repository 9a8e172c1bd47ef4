"""Sparse training and inference on CPUs that compute with the non-zeros alone."""

from fedsieve.kernels.decode import Decoder
from fedsieve.kernels.functional import sparse_conv2d, sparse_linear
from fedsieve.kernels.inference import Predictor
from fedsieve.kernels.library import loaded_isa, unavailable_reason
from fedsieve.kernels.trainer import Trainer

__all__ = ["Decoder", "Predictor", "Trainer", "loaded_isa", "sparse_conv2d", "sparse_linear", "unavailable_reason"]
