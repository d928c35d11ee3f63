"""Against what is measured? PyTorch and performer-pytorch.

Every function gives a call without arguments that computes once and returns
NumPy arrays, or None where its package is not installed.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

Call: TypeAlias = Callable[[], np.ndarray]


def _import_torch() -> Any:
  try:
    import torch
  except ImportError:
    return None
  return torch


def _import_performer() -> Any:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      import performer_pytorch
  except ImportError:
    return None
  return performer_pytorch


def performer(
  queries: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  projection: np.ndarray,
) -> Call | None:
  """Non-causal `FastAttention` of arrays `[H, N, d]`."""
  return _performer(False, queries, keys, values, projection)


def causal_performer(
  queries: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  projection: np.ndarray,
) -> Call | None:
  """Causal `FastAttention`, in the version that runs without a GPU."""
  return _performer(True, queries, keys, values, projection)


def _performer(causal, queries, keys, values, projection) -> Call | None:
  torch, package = _import_torch(), _import_performer()
  if torch is None or package is None:
    return None
  num_features, dim = projection.shape
  with contextlib.redirect_stdout(io.StringIO()):  # Says that it has no GPU.
    module = package.FastAttention(dim, nb_features=num_features, causal=causal)
  module.projection_matrix.copy_(torch.tensor(projection))
  arrays = [torch.tensor(array)[None] for array in (queries, keys, values)]

  def call():
    with torch.inference_mode():
      return module(*arrays)[0].numpy()

  return call


def causal_softmax(
  queries: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> Call | None:
  """PyTorch's exact causal attention of arrays `[H, N, d]`."""
  torch = _import_torch()
  if torch is None:
    return None
  arrays = [torch.tensor(array)[None] for array in (queries, keys, values)]

  def call():
    with torch.inference_mode():
      return torch.nn.functional.scaled_dot_product_attention(
        *arrays, is_causal=True
      )[0].numpy()

  return call


def training_loop(
  params: Sequence[np.ndarray],
  projection: np.ndarray,
  tokens: np.ndarray,
  targets: np.ndarray,
  learning_rate: float,
) -> Call | None:
  """Eager SGD of the papers' layer, from `params` again in every call.

  Args:
    params: query, key and value matrices. Shapes `[d_model, d_model]`.
    projection: random directions. Shape `[R, d_model]`.
    tokens: one prompt for each step. Shape `[P, n, d_model]`.
    targets: label of each query. Shape `[P, d_y]`.
    learning_rate: the step size.

  Returns:
    A call that gives the loss of each step, or None.
  """
  torch = _import_torch()
  if torch is None:
    return None
  directions, tokens, targets = map(torch.tensor, (projection, tokens, targets))
  label_dim = targets.shape[1]

  def phi(x):
    y = x / x.shape[1] ** 0.25
    exponent = y @ directions.T - (y * y).sum(1, keepdim=True) / 2
    return torch.exp(exponent) / directions.shape[0] ** 0.5

  def predict(query, key, value, prompt):
    scores = phi(prompt[-1:] @ query) @ phi(prompt @ key).T
    return (scores @ (prompt @ value) / scores.sum())[0, -label_dim:]

  def train():
    weights = [torch.tensor(array, requires_grad=True) for array in params]
    optimizer = torch.optim.SGD(weights, lr=learning_rate)
    losses = []
    for prompt, target in zip(tokens, targets, strict=True):
      optimizer.zero_grad()
      loss = torch.mean((predict(*weights, prompt) - target) ** 2)
      loss.backward()
      optimizer.step()
      losses.append(loss.detach())
    return torch.stack(losses).numpy()

  def call():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The fastest choice for so small a layer.
    try:
      return train()
    finally:
      torch.set_num_threads(num_threads)

  return call
