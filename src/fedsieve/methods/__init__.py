"""The methods: one paper, one file."""

from fedsieve.methods.fedavg import FedAdam, FedAvg
from fedsieve.methods.swat import Swat
from fedsieve.methods.topk import TopK
from fedsieve.methods.zerofl import ZeroFL

__all__ = ["METHODS", "FedAdam", "FedAvg", "Swat", "TopK", "ZeroFL"]

METHODS = {"fedavg": FedAvg, "fedadam": FedAdam, "swat": Swat, "zerofl": ZeroFL, "topk": TopK}
