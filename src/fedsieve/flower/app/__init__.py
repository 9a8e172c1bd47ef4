"""FedSieve as a Flower app: written to a folder, served, simulated on Ray; what a generated app's two modules call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp


def server_app(here: Path) -> ServerApp:
    """Return the ServerApp of the app whose modules lie in ``here``."""
    from flwr.serverapp import ServerApp

    from fedsieve.flower.app.server import serve

    app = ServerApp()
    app.main()(partial(serve, here))
    return app


def client_app(here: Path) -> ClientApp:
    """Return the ClientApp of the app whose modules lie in ``here``."""
    from fedsieve.flower.app.client import worker_for
    from fedsieve.flower.engine import make_client_app

    return make_client_app(partial(worker_for, here))
