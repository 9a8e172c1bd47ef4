"""A user's own data become a dataset: what ``Dataset.from_numpy``, ``from_torch`` and the others do.

Each reads its form into ``Rows``, of training and, where they are apart, of test examples; ``parts_of`` makes of them
what a ``Dataset`` holds. ``images``, which needs Pillow, is imported when it is used.
"""

from fedsieve.data.constructors.arrays import rows_of_arrays
from fedsieve.data.constructors.items import class_names_of, rows_of_items
from fedsieve.data.constructors.rows import Parts, Rows, parts_of
from fedsieve.data.constructors.splits import rows_of_splits
from fedsieve.data.constructors.tables import rows_of_tables

__all__ = [
    "Parts",
    "Rows",
    "class_names_of",
    "parts_of",
    "rows_of_arrays",
    "rows_of_items",
    "rows_of_splits",
    "rows_of_tables",
]
