"""Flower: an engine (``engine``), a whole run as a Flower app (``app``), and inside an app of one's own (``mod``).

``ClientApp(mods=[SparseMod()])`` and ``strategy.start(grid=SparseGrid(grid), ...)``: broadcasts and answers then travel
in FedSieve's format, and strategy and client functions see the same records as without.
"""

from typing import Any

__all__ = ["SparseGrid", "SparseMod"]


def __getattr__(name: str) -> Any:
    """Import what an app of one's own uses, and with it Flower, when it is asked for."""
    if name in __all__:
        from fedsieve.flower import mod

        return getattr(mod, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
