"""What do all processes learn from? Prompts, their features, their layer.

Random prompts, and those of the papers' layer after a short training, whose
loss is all that this part reports.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, pretraining, statistics
from iclcl_jax import features, moments
from iclcl_jax.types import Array, FeatureMap, Float

LEARNING_RATE = 0.003  # Of the papers' layer.
DATA = 'random', 'trained layer'
COMPARISON = 'Ren & Liu, arXiv:2310.13220v2, section 3 and Fig. 2'


class Encoder(NamedTuple):
  weights: Float[Array, 'd R']  # `W`.
  predictor: Float[Array, 'd d']  # Linear.
  average: Float[Array, 'd R']  # Moving average of `W`, at first `W` itself.


class Views(NamedTuple):
  keys: Float[Array, 'N R']  # Of the demonstrations' keys.
  values: Float[Array, 'N R']  # Of their values, read as inputs.
  query: Float[Array, ' R']  # Of the query.
  own_key: Float[Array, ' R']  # Of the query token's key.

  def pair(self) -> tuple[Array, Array]:
    """Both views of the demonstrations, rows of unit length."""
    return normalise(self.keys), normalise(self.values)


class Prompt(NamedTuple):
  """One prompt; many have leading axes `[S, P]`, and `phi` then `[S]`."""

  phi: features.PositiveFeatures
  query: Float[Array, ' d']
  keys: Float[Array, 'n d']  # Of demonstrations, then of the query's token.
  values: Float[Array, 'n d']  # Their values.
  start: Encoder  # Where the self-supervised processes start.
  views: Any = None  # Features of all of these.


def normalise(rows: Float[Array, 'N d']) -> Float[Array, 'N d']:
  """Rows of unit length; a row of zeros has none."""
  return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def angle(a: Array, b: Array) -> Float[Array, '']:
  """Angle of two arrays, as vectors, in degrees; exact for small angles."""
  a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
  half = jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b))
  return jnp.rad2deg(2 * half)


def see(
  phi: FeatureMap,
  query: Float[Array, ' d'],
  keys: Float[Array, 'n d'],
  values: Float[Array, 'n d'],
) -> Views:
  """Features of a prompt whose last token is the query's.

  They are written in an orthonormal basis of their span, which no process
  leaves: at most `2 n` numbers. Keys and query are divided by one number, so
  that the demonstrations' kernel matrix has largest eigenvalue 1: a step size
  of 1 is stable for the squared loss. The values have a factor of their own.
  """

  def scaled(rows):
    log_scale, features = moments.scaled_rows(phi, rows)
    return jnp.exp(log_scale - jnp.max(log_scale)) * features

  first = scaled(jnp.concatenate([keys[:-1], query[None], keys[-1:]]))
  second = scaled(values[:-1])
  # The order of the rows fixes the basis, in which encoders are drawn.
  ordered = jnp.concatenate([first[:-2], second, first[-2:]])
  basis = jnp.linalg.qr(ordered.T)[0]
  first = first @ basis
  first = first / jnp.linalg.norm(first[:-2], 2)
  return Views(first[:-2], second @ basis, first[-2], first[-1])


@lab.once
def drawn(config: Config) -> tuple[Prompt, np.ndarray]:
  """Prompts of all `DATA`, joined along seeds, and the layers' losses."""
  size, width = config.num_demonstrations + 1, pretraining.TOKEN_DIM
  num_training = config.num_training_prompts

  def draw(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_run, key_prompts, key_rows, key_start = jax.random.split(key, 4)
    run = pretraining.init_run(key_run, num_features=config.num_features)
    prompts = pretraining.draw_prompts(
      key_prompts,
      jnp.arange(num_training + config.num_prompts),
      lambda _: run.task_matrix,
      config.num_demonstrations,
    )
    shape = config.num_prompts, 2 * size + 1, width
    rows = jax.random.normal(key_rows, shape, jnp.float32)
    return run, prompts, rows, jax.random.split(key_start, config.num_prompts)

  def train(run, prompts):
    first, rest = (
      jax.tree.map(lambda x, part=part: x[part], prompts)
      for part in (slice(num_training), slice(num_training, None))
    )
    layer, losses = pretraining.train(run.params, run.phi, first, LEARNING_RATE)
    rows = jax.vmap(lambda x: pretraining.project(layer, x))(rest.tokens)
    return rows, jnp.mean(losses[-64:]) / jnp.mean(first.target**2)

  def start(key):  # Every process of a prompt starts from the same draw.
    shape = width, min(config.num_features, 2 * size)
    key_weights, key_predictor = jax.random.split(key)
    weights = jax.random.normal(key_weights, shape, jnp.float32)
    predictor = jax.random.normal(key_predictor, (width, width), jnp.float32)
    weights, predictor = weights / width**0.5, predictor / width**0.5
    return Encoder(weights, predictor, weights)

  seeds = jnp.arange(config.num_seeds)
  every = lab.compile_quickly(lambda seeds: jax.lax.map(draw, seeds))
  run, prompts, rows, keys = every(seeds)
  trained, losses = lab.compile_quickly(jax.vmap(train))(run, prompts)
  random: Any = rows[:, :, -1], rows[:, :, :size], rows[:, :, size:-1]
  starts = jax.vmap(jax.vmap(start))(keys)
  prompts = [Prompt(run.phi, q, k, v, starts) for q, k, v in (random, trained)]
  # Float64 on the host does not start from arrays of other devices.
  joined = jax.tree.map(
    lambda *x: np.concatenate(x).astype(np.float64), *jax.device_get(prompts)
  )
  views = _of_all(lambda prompt: see(*prompt[:4]), joined)
  return joined._replace(views=views), jax.device_get(losses)


def measure(config: Config) -> np.ndarray:
  """The losses of the layers, relative to predicting 0, by seed."""
  return drawn(config)[1]


def _of_all(fn: Callable[[Prompt], Any], prompts: Prompt) -> Any:
  def with_map(phi, rest):
    return fn(Prompt(phi, *rest))

  every = jax.vmap(jax.vmap(with_map, in_axes=(None, 0)))
  with lab.float64_on_host():
    return lab.compute(every, prompts[0], prompts[1:])


def of_every(config: Config, fn: Callable[[Prompt], Any]) -> dict[str, Any]:
  """Results of `fn(prompt)` by data, arrays with leading axes `[S, P]`."""
  found = _of_all(fn, drawn(config)[0])
  return {
    name: jax.tree.map(lambda x, i=i: np.split(x, len(DATA))[i], found)
    for i, name in enumerate(DATA)
  }


def by_seed(array: Any) -> np.ndarray:
  """Means over the prompts of each seed. Shape `[S, ...]`."""
  return np.mean(np.asarray(array, np.float64), axis=1)


def shown_steps(num_steps: int) -> np.ndarray:
  """Indices of at most 40 steps, evenly apart on a logarithmic axis."""
  return np.unique(np.geomspace(1, num_steps, 40).round().astype(int)) - 1


def curve_rows(data: str, group: str, process: str, curves: Any) -> list[Any]:
  """Means over seeds at the shown steps, as rows of `metrics.jsonl`."""
  means = {k: np.atleast_1d(by_seed(x).mean(axis=0)) for k, x in curves.items()}
  shown = shown_steps(len(next(iter(means.values()))))
  where = {'data': data, 'group': group, 'process': process}
  return lab.tidy(where, {k: x[shown] for k, x in means.items()}, step=shown)


def draw_curve(axis: Any, index: int, name: str, array: Any) -> None:
  """Draws the mean over seeds along steps with its interval."""
  rows = by_seed(array)
  shown = shown_steps(rows.shape[1])
  look = drawing.look(index) | {'linewidth': 2, 'label': name}
  estimates = [statistics.mean(rows[:, step]) for step in shown]
  drawing.band(axis, shown + 1, estimates, markevery=(index % 3, 6), **look)
  axis.set(xscale='log', xlim=(0.95, None))
  axis.xaxis.set_major_formatter('{x:g}')


def about(config: Config, interval: str) -> str:
  return (
    f'{config.num_seeds} seeds of {config.num_prompts} prompts, N = '
    f'{config.num_demonstrations} demonstrations; {interval}: 95 % intervals.'
  )


def statements(data: str, text: str, found: dict[str, lab.Found]) -> lab.Claims:
  """Claims about one of `DATA`; samples `[S, P]` are averaged by seed."""
  found = {
    name: x._replace(value=by_seed(x.value)) if np.ndim(x.value) else x
    for name, x in found.items()
  }
  for claim in lab.statements(f'{data.replace(" ", "_")}:', text, found):
    yield dataclasses.replace(claim, claim=f'{data}: {claim.claim}')


def summary(config: Config, losses: np.ndarray) -> dict[str, Any]:
  note = (
    'Squared error of the last 64 training prompts (each new), relative to '
    'predicting 0; one task matrix a seed, so this measures memorisation.'
  )
  return {'pretraining': statistics.mean(losses).to_dict() | {'note': note}}
