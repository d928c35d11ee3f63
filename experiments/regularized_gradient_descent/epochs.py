"""Where do many epochs of batch 1 with a ridge end, beside the layer?

E epochs with step size 1 / E and a ridge in every visit, of strength alpha or
alpha / N: by gradient descent, and by the closed form. A relative deviation is
a root mean square over the held-out prompts of a seed, over that of the layer's
output; intervals are 95 % t-intervals over seeds.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 10 (batch 1, E epochs).
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.regularized_gradient_descent import steps
from iclcl_jax import dual, features, losses
from iclcl_jax.types import Array

SLIGHT = 0.1
PER_VISIT, PER_EPOCH = 'alpha', 'alpha/N'  # The ridge of one visit.
SLUGS = {PER_VISIT: 'per_visit', PER_EPOCH: 'per_epoch'}
TITLES = {
  PER_EPOCH: 'decay of alpha / N in each visit',
  PER_VISIT: 'decay of alpha in each visit',
}


class Epochs(NamedTuple):
  """Predictions at the end of epochs 0, 1, ..., E."""

  measured: Any  # By gradient descent. Shape `[E + 1, d_y]`.
  predicted: Any  # By its closed form. Shape `[E + 1, d_y]`.


class Results(NamedTuple):
  step: steps.Results  # What one step does.
  curves: Mapping[int, Mapping[str, Epochs]]  # By E, reading; `[S, P, K, ...]`.


def divisors(config: Config) -> dict[str, float]:
  """What alpha is divided by in one visit, by reading."""
  return {PER_VISIT: 1.0, PER_EPOCH: float(config.num_demonstrations)}


def measure(config: Config) -> Results:
  step, alphas = steps.measure(config), np.array(config.alphas)
  strengths = np.stack([alphas / x for x in divisors(config).values()])

  def descend(count):
    one = functools.partial(train, num_epochs=count)
    over = jax.vmap(jax.vmap(one, (None, None, 0)), (None, None, 0))
    found = steps.on_prompts(
      lambda phi, prompt: over(phi, prompt, jnp.asarray(strengths)),
      step.trained,
    )
    return {
      reading: jax.tree.map(lambda x, i=i: x[:, :, i], found)
      for i, reading in enumerate(divisors(config))
    }

  curves = lab.in_threads(descend, config.dual_epochs)
  return Results(step, dict(zip(config.dual_epochs, curves, strict=True)))


def train(
  phi: features.PositiveFeatures,
  prompt: steps.Layer,
  strength: Array,
  *,
  num_epochs: int,
) -> Epochs:
  """Trains with step size `1 / E` and a ridge so strong in EVERY visit."""
  keys, values, size = prompt.keys, prompt.values, prompt.keys.shape[0] - 1

  def predict(state):
    return dual.predict(phi, state, prompt.query, normaliser=prompt.normaliser)

  start = dual.zero_shot(phi, keys[size:], values[size:])
  outputs = dual.train(
    phi,
    start,
    keys[:size],
    values[:size],
    optimizer=optax.sgd(1 / num_epochs),
    penalty=losses.ridge(strength),
    num_epochs=num_epochs,
    batch_size=1,
    observe=predict,
  ).observations[size - 1 :: size]
  first = predict(start)[None]
  return Epochs(
    jnp.concatenate([first, outputs]),
    jnp.concatenate([first, closed_form(prompt, strength, num_epochs)]),
  )


def closed_form(prompt: steps.Layer, strength: Array, num_epochs: int) -> Array:
  """Predictions `[E, d_y]` at the end of every epoch, without training."""
  size = prompt.keys.shape[0] - 1
  initial, demonstrations = left(size, num_epochs, strength)
  factors = jnp.concatenate([demonstrations, initial[:, None]], axis=1)
  return (factors * prompt.weights[None]) @ prompt.values


def left(size: int, num_epochs: int, strength: float | Array):
  r"""What epochs 1 to E leave of `W_0` `[E]` and of demonstrations `[E, N]`.

  With the decay :math:`r = 1 - \alpha/E` of a visit, after e epochs
  :math:`r^{Ne}` and :math:`r^{N-1-i} (1 + r^N + \dots + r^{N(e-1)}) / E`.
  """
  decay = jnp.asarray(1 - strength / num_epochs, float)
  epochs = (decay**size) ** jnp.arange(num_epochs + 1, dtype=decay.dtype)
  ages = decay ** jnp.arange(size, dtype=decay.dtype)[::-1]
  sums = jnp.cumsum(epochs[:-1])[:, None] * ages[None]
  return epochs[1:], sums / num_epochs


def relative(difference: Any, reference: Any) -> np.ndarray:
  """Relative deviation by seed; prompts and labels are axes 1 and last."""

  def size(array):
    return np.sqrt(np.mean(array**2, axis=(1, array.ndim - 1)))

  return size(difference) / size(reference)


def deviation(results: Results, curve: np.ndarray) -> np.ndarray:
  """Of a curve from the strict layer by epoch, `[S, K, E + 1]`."""
  layer = results.step.steps.strict[:, :, :, None]
  return relative(curve - layer, layer)


def ends(
  config: Config, results: Results, count: int
) -> dict[str, dict[float, lab.Estimate]]:
  """Deviations after the last of `count` epochs, by reading and alpha."""
  return {
    reading: {
      alpha: statistics.mean(deviation(results, curve.measured)[:, k, -1])
      for k, alpha in enumerate(config.alphas)
    }
    for reading, curve in results.curves[count].items()
  }


def curve_residual(results: Results) -> float:
  """Largest distance of descent and closed form, over all curves."""

  def largest(measured, predicted):
    # Growing weights round relative to their own size.
    size = np.max(np.abs(measured), axis=(3, 4))
    scale = np.maximum(results.step.layers.scale[:, :, None], size)
    error = np.max(np.abs(measured - predicted), axis=(3, 4))
    return float(np.max(error / scale))

  every = (y for x in results.curves.values() for y in x.values())
  return max(largest(*curve) for curve in every)


def claims(config: Config, results: Results) -> lab.Claims:
  yield from steps.statements(
    f"""closed_form [{steps.SOURCE}] E epochs of batch 1 with a ridge end where
    their closed form says, epoch by epoch | largest residual over epochs, E,
    prompts, seeds, alpha and readings, float64""",
    {'closed_form': lab.at_most(steps.EXACT, curve_residual(results))},
  )
  count, step = config.dual_epochs[-1], results.step.steps
  forms = {'strict': step.strict, 'printed': step.printed}
  for (reading, slug), (k, alpha), (form, layer) in itertools.product(
    SLUGS.items(), enumerate(config.alphas), forms.items()
  ):
    if alpha:
      name = f'slight_{form}_{slug}_{alpha:g}'
      last = results.curves[count][reading].measured[:, :, :, -1]
      apart = relative(last - layer, layer)[:, k]
      yield from steps.statements(
        f"""{name} [{steps.SOURCE}] {count} epochs of batch 1 deviate only
        slightly from the {form} layer: alpha = {alpha:g}, {reading} in a visit
        | relative deviation""",
        {name: lab.at_most(SLIGHT, apart)},
      )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  return [_curves(config, results), _predictions(config, results)]


def _curves(config: Config, results: Results) -> lab.Figure:
  figure, axes = drawing.subplots(1, 2, figsize=(12.5, 5.6))
  count = config.dual_epochs[-1]
  marked = np.unique(np.linspace(0, count, 9).round().astype(int))
  for axis, (reading, title) in zip(axes, TITLES.items(), strict=True):
    measured, predicted = (
      deviation(results, curve) for curve in results.curves[count][reading]
    )
    for k, alpha in enumerate(config.alphas):
      look = drawing.look(k)
      marks = look | {'linestyle': 'none', 'mfc': 'none', 'ms': 9}
      axis.plot(marked, predicted[:, k].mean(axis=0)[marked], **marks)
      look |= {'marker': '', 'label': f'alpha = {alpha:g}'}
      drawing.means(axis, np.arange(count + 1), measured[:, k], **look)
    axis.set_xlabel(f'epoch of {count} (batch 1, step size 1/{count})')
    axis.set(title=title, ylim=(0, None))
  axes[1].set_yscale('symlog', linthresh=1)
  axes[1].set_ylabel('linear below 1, logarithmic above')
  axes[0].set_ylabel('relative deviation from the strict layer')
  drawing.legend(axes[0], 5)
  found = {
    reading: ', '.join(f'{x.value:.2g} (alpha = {a:g})' for a, x in end.items())
    for reading, end in ends(config, results, count).items()
  }
  said = '; '.join(f'{title}: {found[x]}' for x, title in TITLES.items())
  caption = f"""Distance between the dual model and the strict regularised
    layer, relative to the output of the layer, at the end of each of {count}
    epochs of batch 1 with a ridge. Lines: gradient descent, mean over
    {config.num_seeds} pretrained layers with 95 % t-intervals; markers: closed
    form. The right axis is linear up to 1, then logarithmic. After the last
    epoch it is, {said}."""
  return lab.Figure('epochs', figure, caption)


def _predictions(config: Config, results: Results) -> lab.Figure:
  """Predicted labels of the layers and of both dual models."""
  figure, axes = drawing.subplots(2, 1, figsize=(11, 7.4), sharex=True)
  count = config.dual_epochs[-1]
  strict, printed, ridge, _ = results.step.steps
  epochs = results.curves[count][PER_EPOCH].measured[..., -1, :]
  for axis, k in zip(axes, (0, -1), strict=True):
    rows = {
      'true label': results.step.trained.target,
      'strict layer': strict[:, :, k],
      'dual model, one full batch': ridge[:, :, k],
      f'dual model, {count} epochs, alpha / N': epochs[:, :, k],
      'printed layer': printed[:, :, k],
    }
    drawing.strip(axis, rows)
    axis.set_title(f'alpha = {config.alphas[k]:g}')
    axis.label_outer()
  drawing.legend(axes[0], 3)
  task = '' if config.multi_task else ' on one task matrix, which they memorise'
  caption = f"""Predicted labels of held-out prompts: the regularised layer,
    strict (circles) and as printed (triangles), the dual model after one
    full-batch step with a ridge (crosses) and after {count} epochs of batch 1
    (diamonds). The layers were pretrained without a ridge for
    {config.num_epochs} epochs{task}."""
  return lab.Figure('predictions', figure, caption)


def factors(config: Config) -> list[dict[str, Any]]:
  """What training leaves of `W_0` and of the demonstrations, on average."""

  def row(alpha, reading, count):
    strength = alpha / divisors(config)[reading]
    initial, shares = left(config.num_demonstrations, count, strength)
    return {
      'alpha': alpha,
      'reading': reading,
      'num_epochs': count,
      'initial_factor': float(initial[-1]),
      'demonstration_factor': float(np.mean(shares[-1])),
    }

  every = itertools.product(config.alphas, divisors(config), config.dual_epochs)
  return [row(*x) for x in every]


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'curve_residual': curve_residual(results),
    'deviations': [
      {
        'alpha': alpha,
        'reading': reading,
        'num_epochs': count,
        'relative_deviation': estimate._asdict(),
      }
      for count in config.dual_epochs
      for reading, by_alpha in ends(config, results, count).items()
      for alpha, estimate in by_alpha.items()
    ],
    'factors': factors(config),
  }


def tables(config: Config, results: Results) -> dict[str, Any]:
  return {'factors': factors(config)}


def metrics(config: Config, results: Results) -> lab.Metrics:
  """One row for each E, reading, alpha and epoch: deviation of every seed."""
  for count, by_reading in results.curves.items():
    for reading, curve in by_reading.items():
      apart = np.moveaxis(deviation(results, curve.measured), 0, -1)
      yield from lab.tidy(
        {'num_epochs': count, 'reading': reading},
        {'relative_deviation': apart},
        alpha=config.alphas,
        epoch=range(count + 1),
      )
