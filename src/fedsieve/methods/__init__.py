"""The methods: one paper, one file."""

from fedsieve.methods.fedavg import FedAdam, FedAvg
from fedsieve.methods.feddst import FedDST
from fedsieve.methods.fedprox import FedProx
from fedsieve.methods.flash import FLASH, HeteroFLASH
from fedsieve.methods.hetlora import HetLoRA
from fedsieve.methods.nst import DNR, NST
from fedsieve.methods.pdst import PDST
from fedsieve.methods.private import Private
from fedsieve.methods.scaffold import SCAFFOLD
from fedsieve.methods.sparsefedpp import SparseFedPP, TopK
from fedsieve.methods.swat import Swat
from fedsieve.methods.zerofl import ZeroFL

__all__ = [
    "DNR",
    "FLASH",
    "METHODS",
    "NST",
    "PDST",
    "SCAFFOLD",
    "FedAdam",
    "FedAvg",
    "FedDST",
    "FedProx",
    "HetLoRA",
    "HeteroFLASH",
    "Private",
    "SparseFedPP",
    "Swat",
    "TopK",
    "ZeroFL",
]

METHODS = {
    "fedavg": FedAvg,
    "fedadam": FedAdam,
    "fedprox": FedProx,
    "scaffold": SCAFFOLD,
    "swat": Swat,
    "zerofl": ZeroFL,
    "topk": TopK,
    "sparsefedpp": SparseFedPP,
    "dnr": DNR,
    "nst": NST,
    "pdst": PDST,
    "flash": FLASH,
    "hetero_flash": HeteroFLASH,
    "feddst": FedDST,
    "hetlora": HetLoRA,
    "private": Private,
}
