"""The distributed engine: Flower carries the messages (Message API, flwr >= 1.41). Nothing but this package needs flwr.

The loop runs where Flower runs the ServerApp, the client's function where it runs the ClientApp; in between travels one
``Array`` of our own serialization type, which holds a sealed message as every engine has it.

A client's memory lives where its computer is. In a simulation all computers are the engine's own: memories travel
beside the messages, and are in the checkpoints, as those of ``local``. A SuperNode keeps its client's memory to itself,
in files by round (``ClientMemory``), since it is no business of the server's. Either way a round that is asked for
again, or a run that goes on after a crash, finds the memory as it was before that round.
"""

from fedsieve.types import InputError
from fedsieve.types.errors import install

try:
    import flwr.app  # noqa: F401
except ImportError:
    raise InputError(f"this needs Flower: {install('flower')}") from None

from fedsieve.flower.engine.client import NodeContext, make_client_app, simulation_key
from fedsieve.flower.engine.exchange import SimulatedNodes, SuperNodes, grid_engine
from fedsieve.flower.engine.in_memory import inline

__all__ = ["NodeContext", "SimulatedNodes", "SuperNodes", "grid_engine", "inline", "make_client_app", "simulation_key"]
