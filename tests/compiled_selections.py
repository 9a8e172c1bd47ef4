"""Compile the kernels of the exact top-k, launch by launch, for a GPU that is not there; print how many there are."""

from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fedsieve.sparse import selection_launch


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    """Select from tensors of every kind; each launch ends when its kernel is compiled."""
    launches: list[str] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
        assert "cubin" in run(kernel, *arguments, **options | {"warmup": True}).asm
        launches.append(kernel.__name__)

    driver.set_active(AbsentGPU())
    JITFunction.run = compile_only
    image = torch.zeros(2, 16, 4, 4).to(memory_format=torch.channels_last)
    half = [torch.bfloat16, torch.float16]
    own = {torch.int32: [], torch.float32: [torch.float32, torch.bfloat16], **{dtype: [dtype] for dtype in half}}
    for dtype in selection_launch.DIGITS:
        sizes = set()
        for x, k in product((image, torch.zeros(1), torch.zeros(7)), (1, torch.tensor(16))):
            for out_dtype in (torch.bool, *own[dtype]):
                launches.clear()
                selection_launch.select(x.to(dtype), k, out_dtype)
                sizes.add(len(launches))
        print(str(dtype).removeprefix("torch."), *sizes)
    for dtype, n in product((torch.float32, torch.bfloat16), (1024, 1023)):
        launches.clear()
        selection_launch.Batch([image.to(dtype), torch.zeros(n, dtype=dtype)], [3, 4], torch.bfloat16)()
        print("batch", len(launches))


if __name__ == "__main__":
    main()
