"""What a reader of files hands to an architecture."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Checkpoint(NamedTuple):
  """A model on disk, in the layout and with the names of Hugging Face.

  Attributes:
    config: the content of `config.json`: `model_type`, `hidden_size`, ...
    tensors: arrays by name, such as `model.layers.0.self_attn.q_proj.weight`.
  """

  config: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]
