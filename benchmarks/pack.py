"""What a packed dataset weighs (``fedsieve data NAME --pack``), and CIFAR-10 by other codes without loss.

Claim: MNIST, FEMNIST and Speech Commands' features take one file below 50 MB each, and CIFAR-10 two. n: the whole
sets that are under FEDSIEVE_DATA; the codes on the first 10,000 training images of CIFAR-10, as one sheet of 100 x 100,
PNG and WebP by Pillow at their smallest. Sizes do not depend on the machine.

    python benchmarks/pack.py            (five minutes)
"""

from __future__ import annotations

import json
import lzma
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedsieve.data import SOURCES, root_from
from fedsieve.data.pack import write_pack
from fedsieve.data.pixels import pack_images
from fedsieve.types import InputError

RESULTS = Path(__file__).parent / "results" / "pack.json"
ROW = 100


def packed(name: str) -> dict[str, Any]:
    """Return the bytes of a dataset's arrays, and of the files that it is packed into."""
    arrays, counts = SOURCES[name].arrays(root_from(None))
    with tempfile.TemporaryDirectory() as folder:
        files = write_pack(Path(folder) / name, name, counts, arrays)
        sizes = [file.stat().st_size for file in files]
    examples = len(arrays["train_y"]) + len(arrays["test_y"])
    return {"examples": examples, "raw": sum(array.nbytes for array in arrays.values()), "files": sizes}


def codes() -> dict[str, float]:
    """Return the bits of a value of CIFAR-10 by each code."""
    images = SOURCES["cifar10"].arrays(root_from(None))[0]["train_x"][: ROW * ROW]
    sheet = images.reshape(ROW, ROW, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(32 * ROW, 32 * ROW, 3)
    sizes = {"xz": len(lzma.compress(images.tobytes(), preset=9))}
    for form, options in (("png", {"optimize": True}), ("webp", {"lossless": True, "quality": 100, "method": 6})):
        file = BytesIO()
        Image.fromarray(np.ascontiguousarray(sheet)).save(file, form, **options)
        sizes[form] = len(file.getvalue())
    sizes["pack"] = sum(part.nbytes for part in pack_images(images).values())
    return {name: 8 * size / images.size for name, size in sizes.items()}


def table(what: str) -> str:
    """Return the table of the datasets, or of the codes."""
    results = json.loads(RESULTS.read_text())
    if what == "codes":
        names = {"xz": "xz", "png": "PNG", "webp": "WebP, lossless", "pack": "`--pack`"}
        rows = [
            f"| {label} | {results['codes'][name]:.2f} | {results['codes'][name] / 8 * 60_000 * 3072 / 1e6:.0f} MB |"
            for name, label in names.items()
        ]
        return "\n".join(["| code | bits a value | all 60,000 images |", "|---|---|---|", *rows])
    lines = ["| dataset | examples | arrays | packed |", "|---|---|---|---|"]
    for name, own in results["datasets"].items():
        files = " + ".join(f"{size / 1e6:.1f}" for size in own["files"])
        lines.append(f"| `{name}` | {own['examples']:,} | {own['raw'] / 1e6:.0f} MB | {files} MB |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is there, and print the tables."""
    datasets = {}
    for name in SOURCES:
        try:
            datasets[name] = packed(name)
        except InputError as error:
            print(error)
    RESULTS.write_text(json.dumps({"datasets": datasets, "codes": codes()}, indent=1) + "\n")
    print(table("datasets"), table("codes"), sep="\n\n")


if __name__ == "__main__":
    main()
