"""Inside a Flower app of one's own: a mod for its clients, a grid for its server (docs/flower.md)."""

from fedsieve.types.errors import install

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise
    raise ModuleNotFoundError(f"fedsieve.flower needs Flower: {install('flower')}", name="flwr") from None

from fedsieve.flower.mod.client import SparseMod
from fedsieve.flower.mod.server import SparseGrid

__all__ = ["SparseGrid", "SparseMod"]
