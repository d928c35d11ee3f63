"""The tasks of one gradient step and of trained layers, in two frames."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import statistics
from iclcl_jax.accounts import softmax_regression as account

FRAMES = 'in place', 'held out'
SHARPNESS = 2.0  # Of the targets of the frame 'held out'.
CLOSE_COSINE = 0.9
LI, OURS, CONTROL = 'Li et al., arXiv:2304.13276', 'derived here', 'control'
Size = tuple[int, int]  # Words of a document, and their width.


class Tasks(NamedTuple):
  """Softmax regressions, and the words on which they are judged."""

  posed: account.Problem
  queries: Any
  answer: Any


def draw(key: Any, size: Size, frame: Any) -> Tasks:
  """Draws one task.

  Args:
    key: consumed.
    size: words of a document and their width.
    frame: 0 for a target that has nothing to do with its document, judged in
      place; 1 for a target that a hidden vector makes, judged on a new
      document with the same vector.

  Returns:
    The task.
  """
  keys = jax.random.split(key, 4)
  document = jax.random.normal(keys[0], size) / size[1] ** 0.5
  other = jax.random.normal(keys[1], size) / size[1] ** 0.5
  hidden = SHARPNESS * jax.random.normal(keys[2], size[1:])
  waits = jax.random.exponential(keys[3], size[:1])
  free = waits / jnp.sum(waits)  # Uniform on the simplex.
  made, answer = (jax.nn.softmax(x @ hidden) for x in (document, other))
  target = jnp.where(frame == 0, free, made)
  return Tasks(
    account.Problem(document, target),
    jnp.where(frame == 0, document, other),
    jnp.where(frame == 0, free, answer),
  )


def unit_rate(size: Size) -> float:
  """The step that is best where the prediction is nearly uniform."""
  return size[0] ** 2 * size[1] / sum(size)


def cosine(a: Any, b: Any) -> Any:
  """Cosine of two vectors of logits, whose means say nothing."""
  a, b = a - jnp.mean(a), b - jnp.mean(b)
  return (a @ b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def seed_keys(config: Any, size: Size, stream: int) -> Any:
  """One key for each repetition; both frames see the same documents."""
  root = jax.random.fold_in(jax.random.key(config.seed), size[0] + stream)
  return jax.random.split(jax.random.fold_in(root, size[1]), config.num_seeds)


def claim(
  name: str,
  source: str,
  text: str,
  statistic: str,
  estimate: Any,
  **bounds: Any,
) -> lab.Claim:
  """A claim; samples of repetitions are averaged."""
  if np.ndim(estimate) == 1 and not isinstance(estimate, lab.Estimate):
    estimate = statistics.mean(estimate)
  return lab.Claim(
    id=f'softmax-regression-{name}',
    source=source,
    claim=text,
    statistic=statistic,
    estimate=estimate,
    **bounds,
  )
