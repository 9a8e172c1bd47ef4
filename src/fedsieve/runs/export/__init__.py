"""The deployed model in use: opened from a run directory or a .fsv file, asked for predictions, exported.

``open_model`` -> ``TrainedModel`` -> ``predict``, or ``export`` to ONNX, to safetensors, or to a compact sparse file.
"""

from fedsieve.runs.export.examples import ExampleSource, open_examples
from fedsieve.runs.export.formats import check_export_path, export
from fedsieve.runs.export.metadata import ModelMetadata
from fedsieve.runs.export.model import TrainedModel, open_model
from fedsieve.runs.export.prediction import Prediction, choose_forward, predict, print_predictions

__all__ = [
    "ExampleSource",
    "ModelMetadata",
    "Prediction",
    "TrainedModel",
    "check_export_path",
    "choose_forward",
    "export",
    "open_examples",
    "open_model",
    "predict",
    "print_predictions",
]
