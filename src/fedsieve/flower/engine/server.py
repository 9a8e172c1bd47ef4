"""The server's loop inside a ServerApp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsieve.engine.engines import Engine, Quorum
from fedsieve.engine.federation import Federation
from fedsieve.flower.engine.client import simulation_key
from fedsieve.flower.engine.exchange import grid_engine
from fedsieve.flower.engine.nodes import SimulatedNodes, SuperNodes
from fedsieve.flower.private import is_simulated

PENDING = 32
"""Messages under way at once in a simulation, which holds them all in one process's memory."""


@dataclass(frozen=True)
class ServerContext:
    """What Flower gives a server: settings and a grid, which is a simulation's or a deployment's."""

    config: Mapping[str, Any]
    grid: Grid
    key: bytes | None
    """A simulation's; None in a deployment, where somebody must set one."""

    @property
    def simulated(self) -> bool:
        """Whether all nodes are this machine's own."""
        return self.key is not None

    def engine(self, federation: Federation, quorum: Quorum, about: Mapping[str, str]) -> Engine:
        """Return the engine; ``about`` is what every node is told of the run."""
        if self.simulated:
            return grid_engine(self.grid, SimulatedNodes(self.grid, about), quorum, PENDING)
        return grid_engine(self.grid, SuperNodes(self.grid, federation, about), quorum, pause=0.5)


Serve: TypeAlias = Callable[[ServerContext], None]


def make_server_app(serve: Serve) -> ServerApp:
    """Return an app whose main function is ``serve``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        key = simulation_key(context.run_id) if is_simulated(grid) else None
        serve(ServerContext(context.run_config, grid, key))

    return app
