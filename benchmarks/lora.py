"""What fine-tuning costs on the wire: ten rounds of LoRA on a frozen ViT-tiny, on every engine and in a Flower app.

Claim: from its second round on a client is sent at most 1.1 times what is trained, and at least 50 times less than the
whole model, which is what every round took before. n: four clients, all of them in each of ten rounds, one run a row;
the recipe lora.vit's adapters (rank 8, of attention's query, key and value), on eight images of noise a client, from
random weights: what a message weighs depends on shapes, and hardly on data. Plain Flower's ArrayRecords are those of
the same training in a ClientApp with FedAvg; its grid is an in-process one (tests/flower_grid.py).

    python benchmarks/lora.py            (two minutes on one core)
    python benchmarks/lora.py --table    (print the table of committed results)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsieve import Data, Dataset, Run, Task, local, methods, pool, rounds
from fedsieve.client.lora import LoRA
from fedsieve.client.models import MODELS
from fedsieve.client.training import sgd
from fedsieve.engine import Engine
from fedsieve.engine.setup import open_run

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lora.json"
CLIENTS, ROUNDS, IMAGES = 4, 10, 8
ADAPTERS = LoRA(modules="*.qkv")
TIERS: dict[str, Any] = {"hetlora": (0.25, 0.25, 0.5)}


def start() -> nn.Module:
    """Return the frozen model, always with the same weights."""
    torch.manual_seed(0)
    return MODELS["vit_tiny"](3, 10)


def noise() -> Dataset:
    """Return images of noise."""
    torch.manual_seed(1)
    n = CLIENTS * IMAGES
    data = Data(torch.randn(n, 3, 32, 32), torch.arange(n) % 10)
    return Dataset("noise", data, data.subset(torch.arange(4)), tuple("abcdefghij"))


def run_of(method: Any = None, adapters: LoRA | None = ADAPTERS, model: Any = "vit_tiny") -> Run:
    """Return the run that is weighed."""
    method = method or methods.FedAvg()
    task = Task(model, noise(), CLIENTS, adapters=adapters, init=start(), tiers=TIERS.get(method.name, (1.0,)))
    return Run(method, task, ROUNDS, CLIENTS, batch=IMAGES, lr=0.05, lr_end=0.05, evaluate_every=ROUNDS)


def weighed(run: Run, engine: Callable[[], Engine] = local) -> dict[str, float]:
    """Return the bytes of a client and round: down in the first, down from the second on, and up."""
    results = [r for r in rounds(run, engine()) if r.t > 0]
    down = [r.bytes_down / len(r.clients) for r in results]
    return {
        "first": down[0],
        "later": max(down[1:]),
        "up": max(r.bytes_up / len(r.clients) for r in results),
    }


def in_flower(mods: list[Any], around: Callable[[Any], Any], whole: bool = True) -> dict[str, float]:
    """Return the same of a ClientApp that fine-tunes with FedAvg, of records of the model or of adapters alone."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    sys.path.insert(0, str(HERE.parent / "tests"))
    from flower_grid import InProcessGrid

    federation = open_run(run_of())
    app, sizes = ClientApp(mods=mods), {"down": list[float](), "up": list[float]()}

    def record(model: nn.Module) -> ArrayRecord:
        named = {name for name, w in model.named_parameters() if w.requires_grad}
        return ArrayRecord({n: v for n, v in model.state_dict().items() if whole or n in named})

    @app.train()
    def train(message: Message, context: Any) -> Message:
        model, client = federation.model(), int(context.node_config["partition-id"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=whole)
        t = int(message.content["config"]["server-round"])
        for _ in sgd(federation.device(t, client, model, "cpu", {})):
            pass
        content = {"arrays": record(model), "metrics": MetricRecord({"num-examples": IMAGES})}
        return Message(RecordDict(content), reply_to=message)

    class Weighing(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = [*messages]
            replies = super().send_and_receive(messages, timeout=timeout)
            for way, several in (("down", messages), ("up", replies)):
                records = [r for m in several for r in m.content.array_records.values()]
                sizes[way].append(sum(len(a.data) for r in records for a in r.values()) / CLIENTS)
            return replies

    grid = around(Weighing(app, CLIENTS))
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy.start(grid, record(federation.model()), num_rounds=ROUNDS)
    down = [size for size in sizes["down"] if size]
    assert len(down) == ROUNDS
    return {"first": down[0], "later": max(down[1:]), "up": max(sizes["up"])}


def measure() -> dict[str, Any]:
    """Weigh every way."""
    from fedsieve.flower import SparseGrid, SparseMod
    from fedsieve.flower.engine import inline

    model = open_run(run_of()).model()
    trained = sum(4 * w.numel() for w in model.parameters() if w.requires_grad)
    rows = {
        "FedSieve, `local`": weighed(run_of()),
        "FedSieve, `pool:2`": weighed(run_of(), lambda: pool(2)),
        "FedSieve, `flower`": weighed(run_of(), inline),
        "FedSieve, Top-k of the update at 80 %": weighed(run_of(methods.TopK(0.8, of="update"))),
        "FedSieve, FLASH at density .2": weighed(run_of(methods.FLASH(0.2, c_d=2, E_d=2))),
        "FedSieve, HetLoRA at ranks 8, 4, 2": weighed(run_of(methods.HetLoRA())),
        "Flower app with `SparseGrid`, `SparseMod`": in_flower([SparseMod()], SparseGrid),
        "plain Flower, whole model": in_flower([], lambda grid: grid),
        "plain Flower, adapters alone": in_flower([], lambda grid: grid, whole=False),
    }
    return {"whole": sum(4 * v.numel() for v in model.state_dict().values()), "trained": trained, "rows": rows}


def table() -> str:
    """Return the results as a table."""
    results = json.loads(RESULTS.read_text())
    before, trained = results["rows"]["FedSieve, `local`"]["first"], results["trained"]
    lines = [
        "| kB a client and round | down, round 1 | down, from round 2 | beside what is trained | before | up |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        first, later, up = (f"{row[part] / 1e3:,.0f}" for part in ("first", "later", "up"))
        less = f"{before / row['later']:.0f}x less"
        lines.append(f"| {name} | {first} | {later} | {row['later'] / trained:.2f}x | {less} | {up} |")
    return "\n".join(lines)


def card_line() -> str:
    """Return HetLoRA's results as a line of its card."""
    rows, trained = json.loads(RESULTS.read_text())["rows"], json.loads(RESULTS.read_text())["trained"]
    own, equal = rows["FedSieve, HetLoRA at ranks 8, 4, 2"], rows["FedSieve, `local`"]
    page = "../../benchmarks/messages.md#fine-tuning"
    return (
        f"ViT-tiny, {trained / 1e3:.0f} kB of adapters at rank 8, classes of 8, 4, 2: from its second round a client "
        f"is sent {own['later'] / 1e3:.0f} kB and sends {own['up'] / 1e3:.0f} kB on average, where all have rank 8 "
        f"{equal['later'] / 1e3:.0f} and {equal['up'] / 1e3:.0f} kB ([fine-tuning]({page}))."
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--table" not in sys.argv:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    print(table())
