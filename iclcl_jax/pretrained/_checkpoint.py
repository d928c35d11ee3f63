"""What a reader of files hands to an architecture."""

import importlib
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


def import_reader(name: str) -> Any:
  """Imports a package that only the readers of files need.

  Args:
    name: the package, or a module of it.

  Raises:
    ValueError: if it is not installed; the message says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f'reading this file needs the package {name.partition(".")[0]!r}, which '
      f"can't be imported ({error}). Install it: pip install "
      "'iclcl_jax[lm]'."
    ) from error
