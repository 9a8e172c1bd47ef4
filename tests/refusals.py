"""Mistakes that are answered in one line."""

import re
from collections.abc import Callable

import pytest

from fedsieve.types import InputError


def refused(call: Callable[[], object], pattern: str) -> None:
    """Assert that a call raises InputError, of one line, in which the pattern is found."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)
