"""Against what is measured? PyTorch and performer-pytorch.

Every function gives a call without arguments that computes once and returns
NumPy arrays, or None where its package is not installed.
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Call = Callable[[], np.ndarray]


def load(name: str) -> Any:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return importlib.import_module(name)
  except ImportError:
    return None


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
  """The function as a program of PyTorch, made at its first call."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return load('torch').compile(fn)


def working(call: Call) -> Call | None:
  """The call, or None where PyTorch finds nothing that compiles C++."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      call()
  except Exception as error:  # PyTorch raises kinds of its own.
    print(f'A compiled peer is left out: {type(error).__name__}')
    return None
  return call


def performer(
  queries: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  projection: np.ndarray,
  *,
  causal: bool = False,
) -> Call | None:
  """`FastAttention` of arrays `[H, N, d]`; causal as it runs without a GPU."""
  torch, package = load('torch'), load('performer_pytorch')
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
  torch = load('torch')
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
  *,
  is_compiled: bool = False,
) -> Call | None:
  """SGD of the papers' layer, from `params` again in every call.

  Matrices `[d_model, d_model]`, directions `[R, d_model]`, a prompt for each
  step `[P, n, d_model]` and labels `[P, d_y]`; the call gives the loss of each.
  """
  torch = load('torch')
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

  def loss_of(query, key, value, prompt, target):
    return torch.mean((predict(query, key, value, prompt) - target) ** 2)

  loss_fn = compiled(loss_of) if is_compiled else loss_of

  def train():
    weights = [torch.tensor(array, requires_grad=True) for array in params]
    optimizer = torch.optim.SGD(weights, lr=learning_rate)
    losses = []
    for prompt, target in zip(tokens, targets, strict=True):
      optimizer.zero_grad()
      loss = loss_fn(*weights, prompt, target)
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

  return working(call) if is_compiled else call
