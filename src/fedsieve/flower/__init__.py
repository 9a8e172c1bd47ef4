"""FedSieve inside a Flower app: a mod for its clients, a grid for its server, and the app as it was.

How an app takes them: docs/how-to/flower.md.

``ClientApp(mods=[SparseMod()])`` and ``strategy.start(grid=SparseGrid(grid), ...)``: broadcasts and answers then travel
in FedSieve's format, and strategy and client functions see the same records as without.
"""

from fedsieve.failures import install

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise
    raise ModuleNotFoundError(f"fedsieve.flower needs Flower: {install('flower')}", name="flwr") from None

from fedsieve.flower.grid import SparseGrid
from fedsieve.flower.mod import SparseMod

__all__ = ["SparseGrid", "SparseMod"]
