"""Examples in docstrings know the modules of the library by name."""

import pytest

from tests import examples


@pytest.fixture(autouse=True)
def names(doctest_namespace):
  """Adds them to what an example finds in its own module."""
  doctest_namespace |= examples.NAMES
