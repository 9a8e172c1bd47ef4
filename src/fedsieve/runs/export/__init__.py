"""The deployed model in use: opened from a run directory or a .fsv file, asked for predictions, exported.

``open_deployed`` -> ``Deployed`` -> ``predict``, or ``export`` to ONNX, to safetensors, or to a compact sparse file.
"""

from fedsieve.runs.export.formats import check_out, export
from fedsieve.runs.export.inputs import Inputs, open_inputs
from fedsieve.runs.export.metadata import Card
from fedsieve.runs.export.model import Deployed, open_deployed
from fedsieve.runs.export.predict import Prediction, forward, predictions, show

__all__ = [
    "Card",
    "Deployed",
    "Inputs",
    "Prediction",
    "check_out",
    "export",
    "forward",
    "open_deployed",
    "open_inputs",
    "predictions",
    "show",
]
