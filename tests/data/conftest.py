"""The small archives that tests of datasets build from."""

from public_archives import cifar, cifar100, leaf, root, versions  # noqa: F401
