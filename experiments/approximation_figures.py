"""The old home of pieces of figures, until their last user has moved."""

from typing import Any

from experiments.lab.figures import COLOURS as COLOURS
from experiments.lab.figures import MARKERS as MARKERS
from experiments.lab.figures import label_ends as label_ends
from experiments.lab.figures import plain_ticks as plain_ticks

STYLE: dict[Any, Any] = {
  'font.size': 9,
  'axes.titlesize': 9.5,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'svg.hashsalt': 'approximation',
}
