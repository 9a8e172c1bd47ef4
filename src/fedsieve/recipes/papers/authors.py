"""What the authors' public code does otherwise than their paper, as settings to be applied after those of a row.

FLASH: github.com/SaraBabakN/flash_fl at fb88313, which trains MNIST and CIFAR-10 (it reads no FEMNIST). Which of the
two a paper supports: docs/explanation/authors.md.

SWAT, central: github.com/AamirRaihan/SWAT at bbe271a, run_configurations/unstructured_constant_resnet18_schedule_90.

SparseFedPP: github.com/AGuastella/fl_powerpropagation at 34fb68c, whose notebook holds the runs of its Fig. 1.
"""

from __future__ import annotations

CHANNELS = ("task.input_mean=0.4914,0.4822,0.4465", "task.input_std=0.2023,0.1994,0.2010")
"""What both FLASH's and SWAT's code normalise CIFAR-10 by."""
SWAT = ("momentum=0.9", "lr_milestones=50,100", "norm_weight_decay=false", "task.augment=crop_flip", *CHANNELS)
FLASH_DATA = {
    "mnist": ("task.model=mnist_net_softmax",),
    "cifar10": ("task.initialisation=xavier_uniform", *CHANNELS, "batch=32"),
}
"""Of each dataset: its network's output, initial weights, normalisation, batch."""
FLASH_SCHEDULE = ("lr_rounds=1000", "lr_offset=-1")
FLASH_MASKS = ("method.draw=bernoulli", "method.weighting=equal")
FLASH_METHODS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "nst": FLASH_MASKS,
    "pdst": FLASH_MASKS,
    "flash": (*FLASH_MASKS, "method.excess=clip"),
    "hetero_flash": ("method.draw=bernoulli", "method.excess=clip", "method.subset=magnitude", "task.tier_by=round"),
}


def authors_settings(table: str, recipe: str) -> tuple[str, ...]:
    """Return the settings of a row of a table; none where no public code is known, or it does what the paper says."""
    method, _, preset = recipe.partition(".")
    dataset = preset.removeprefix("flash_").partition("_")[0]
    if table.startswith("flash_") and method in FLASH_METHODS and dataset in FLASH_DATA:
        return (*FLASH_DATA[dataset], *FLASH_SCHEDULE, *FLASH_METHODS[method])
    if recipe == "swat.central_cifar10":
        return SWAT
    if table.startswith("sparsefedpp_") and method == "sparsefedpp":
        return ("method.activations=cached",)
    return ()
