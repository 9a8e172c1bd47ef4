"""What a round costs when nobody trains: FedSieve's own overhead, and its memory as clients are added.

Claim: ten idle clients of MNISTNet's size take at most 70 ms a round in ``local``, most of them for encoding, decoding
and checking twenty messages of a megabyte; the memory of a round does not grow with the number of clients; the digits'
first round ends within 3 s of process start.
Peers, measured once on two cores with n = 5 to 60 rounds: Flower 1.41's simulation has a floor of 0.2 s a round (two
0.1 s polls) and about 16 s to the end of its first round; pfl 0.6.0 about equals a plain loop over one resident model,
which takes 2.2 ms a round here (load, touch and sum 262K parameters ten times, no bytes encoded).
n: 200 rounds after 20 to warm up, medians, samples spoilt by a busy machine dropped; memory: one process each.

    python benchmarks/round.py [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from fedsieve import Data, Dataset, Device, Method, Run, ServerState, Task, Update, local, rounds
from fedsieve.cli.bench.measurement import machine, summarize_samples, time_sample
from fedsieve.client.process import peak_memory_mb  # noqa: F401 (memory's process)
from fedsieve.client.training import load_, params_of
from fedsieve.methods import FedAvg
from fedsieve.server.aggregate import tensors
from fedsieve.types import RoundContext, Tree


@dataclass(frozen=True)
class Idle(Method[ServerState]):
    """FedAvg whose clients load the model and send it back."""

    inner: FedAvg = FedAvg()
    name: str = "idle"

    def init(self, model: nn.Module, rng: torch.Generator) -> ServerState:
        return self.inner.init(model, rng)

    def broadcast(self, state: ServerState, context: RoundContext) -> Tree:
        return state.params

    def client(self, down: Tree, device: Device) -> Update:
        load_(device.model, tensors(down))
        return Update(params_of(device.model), len(device.data))

    def aggregate(self, state: ServerState, updates: Iterable[Update], context: RoundContext) -> ServerState:
        return self.inner.aggregate(state, updates, context)


def noise() -> Dataset:
    """Two thousand images of noise: enough for a thousand clients."""
    x, y = torch.randint(256, (2000, 1, 28, 28), dtype=torch.uint8), torch.arange(2000) % 10
    return Dataset("noise", Data(x, y), Data(x[:1], y[:1]), tuple("0123456789"))


def idle(clients: int, rounds: int) -> Run:
    """Return a run in which all of ``clients`` do nothing."""
    return Run(Idle(), Task("mnist_net", noise, clients), rounds, clients, evaluate_every=10**6)


def overhead() -> dict[str, float]:
    """Return the milliseconds of a round of ten idle clients."""
    stream = rounds(idle(10, 220), local())
    for _ in range(20):
        next(stream)
    seconds, valid, dropped = summarize_samples([time_sample(lambda: next(stream)) for _ in range(199)])
    return {"ms_per_round": seconds * 1e3, "samples_kept": valid, "samples_dropped": dropped}


def memory(clients: int) -> float:
    """Return the peak memory (MB) of a process that runs three rounds of ``clients`` idle clients."""
    code = f"import round as r; list(r.rounds(r.idle({clients}, 3), r.local())); print(r.peak_memory_mb())"
    here = Path(__file__).parent
    return float(subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True).stdout)


def first_round() -> float:
    """Return the seconds from the start of ``fedsieve run zerofl.digits`` to its first round's line: median of five."""
    command = [str(Path(sys.executable).with_name("fedsieve")), "run", "zerofl.digits", "-s", "rounds=1"]
    times = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            with subprocess.Popen([*command, "--out", f"{folder}/run"], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout
                next(line for line in process.stdout if line.startswith("round 1/"))
                times.append(time.perf_counter() - began)
                process.communicate()
    return median(times)


def main() -> None:
    """Print the figures, as one JSON object with --json."""
    results = {"machine": machine(), **overhead()}
    results |= {f"peak_mb_{n}_clients": memory(n) for n in (10, 1000)} | {"s_first_round_of_digits": first_round()}
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<26} {value if isinstance(value, str | int) else round(value, 2)}")


if __name__ == "__main__":
    main()
