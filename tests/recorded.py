"""What stands in for a GPU's graphs on a CPU: operations that are recorded, and taken again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A CUDA graph on the CPU: it notes the operations, and takes them again, in the same memory, without Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for the device"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    several = result if isinstance(result, tuple | list) else [result]
    return [one for one in several if isinstance(one, Tensor)]


class Generator(torch.Generator):
    """A generator with an offset, as a GPU's has, that nobody draws from."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        assert offset == 0


class Graphs:
    """In place of CudaGraphs. What a recorded step changes is put back as what steps before a capture change is."""

    def __init__(self) -> None:
        self.chance, self.captures = Generator(), 0

    def renew(self) -> None:
        """Take other memory: here all is kept."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        recorder = Recorder()
        with recorder:
            step()
        return recorder.replay

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        yield

    @contextmanager
    def own_chance(self) -> Iterator[None]:
        yield
