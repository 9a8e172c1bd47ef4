"""The deployed model in use: opened from a run directory or a .fsv file, asked for predictions, exported.

``open_deployed`` -> ``Deployed`` -> ``predict``, or ``export`` to ONNX, to safetensors, or to a compact sparse file.
"""

from fedsieve.deployed.card import Card
from fedsieve.deployed.export import check_out, export
from fedsieve.deployed.inputs import Inputs, open_inputs
from fedsieve.deployed.model import Deployed, open_deployed
from fedsieve.deployed.predict import Prediction, forward, predictions, show

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
