"""Do many small gradient steps reach the layer, and along the known curve?"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.equivalence import learning, one_step
from experiments.lab import Config, figures as drawing, pretraining
from iclcl_jax import attention, dual, features, precision
from iclcl_jax.types import Array, Float

CURVE_TOLERANCE = 1e-10  # Of `Descent.curve_residual` in float64.


class Descent(NamedTuple):
  """Many gradient steps, batch 1, `T` visits in all; one prompt or `[S, P]`."""

  # Residuals are over the scale of `equivalence.Residuals`.
  attention: Float[Array, ' d_y']  # Predicted label of the layer.
  dual: Float[Array, ' d_y']  # Predicted label after the last visit.
  residual: Float[Array, '']  # Distance to attention then.
  distances: Float[Array, ' _']  # To attention after each visit, `[T + 1]`.
  predicted: Float[Array, ' _']  # Its closed form. Shape `[T + 1]`.
  curve_residual: Float[Array, '']  # Of these two curves.


class Descents(NamedTuple):
  once: Descent  # One epoch, in float64.
  float64: Descent  # All epochs.
  float32: Descent  # All epochs.
  target: np.ndarray  # True labels. Shape `[S, P, d_y]`.


Results = Mapping[int, Descents]  # By number of demonstrations.


def descend(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
  *,
  num_epochs: int,
) -> Descent:
  r"""Trains the dual model by batch 1 for E epochs, step size `1 / E`.

  The gradient is constant, so the distance to the attention output has a
  closed form: with :math:`n_i` visits to demonstration `i` so far and
  attention weights :math:`a_i`,

  .. math:: |f(q) - h| = \Bigl|\sum_i (1 - n_i / E)\, a_i v_i\Bigr|,

  which is 0 after the last visit, falls linearly over whole epochs, and need
  not fall in every step. Of the tokens the demonstrations come first.

  References:
    Ren & Liu, arXiv:2310.13220v1, section 5 (batch 1, E epochs, a loss rate
    E times the step size).
  """
  query, keys, values = pretraining.project(params, tokens)
  size = keys.shape[0] - 1
  normaliser = dual.normaliser(phi, keys, query)

  def predict(state):
    return dual.predict(phi, state, query, normaliser=normaliser)

  start = dual.zero_shot(phi, keys[size:], values[size:])
  trajectory = dual.train(
    phi,
    start,
    keys[:size],
    values[:size],
    optimizer=optax.sgd(1 / num_epochs),
    num_epochs=num_epochs,
    batch_size=1,
    observe=predict,
  )
  outputs = jnp.concatenate([predict(start)[None], trajectory.observations])
  scores, _ = attention.scores(phi, query, keys)
  weights = scores / jnp.sum(scores)
  target = attention.kernel_attention(phi, query, keys, values)
  visits = (
    jnp.arange(num_epochs * size + 1)[:, None]
    + jnp.arange(size - 1, -1, -1)[None]
  ) // size
  rest = (1 - visits / num_epochs).astype(keys.dtype)
  predicted = (rest * weights[None, :size]) @ values[:size]
  # Positive features: every weight is its own absolute value.
  scale = jnp.max(weights @ (jnp.abs(values) + jnp.abs(target)[None]))
  distances = jnp.linalg.norm(outputs - target[None], axis=1)
  closed_form = jnp.linalg.norm(predicted, axis=1)
  return Descent(
    attention=target[-pretraining.LABEL_DIM :],
    dual=outputs[-1, -pretraining.LABEL_DIM :],
    residual=jnp.max(jnp.abs(outputs[-1] - target)) / scale,
    distances=distances,
    predicted=closed_form,
    curve_residual=jnp.max(jnp.abs(distances - closed_form)) / scale,
  )


def measure(config: Config) -> Results:
  """Trains the dual models of a few held-out prompts of every layer."""
  few = config.num_dual_prompts

  def train(found, dtype, num_epochs):
    fn = functools.partial(descend, num_epochs=num_epochs)
    return pretraining.over_prompts(fn, found, dtype, few)

  return {
    size: Descents(
      train(found, 'float64', 1),
      train(found, 'float64', config.dual_epochs),
      train(found, 'float32', config.dual_epochs),
      found.target[:, :few],
    )
    for size, found in one_step.trained(config).items()
  }


def residuals(results: Results) -> dict[int, dict[str, float]]:
  """The largest residuals, by N and name; NaN if one is not a number."""
  return {
    size: {
      'residual_multi_epoch_float64': float(np.max(found.float64.residual)),
      'residual_multi_epoch_float32': float(np.max(found.float32.residual)),
      'c14_curve_residual_float64': _curve_residual(found),
    }
    for size, found in results.items()
  }


def _curve_residual(found: Descents) -> float:
  pair = found.once, found.float64
  return float(np.max([np.max(x.curve_residual) for x in pair]))


def claims(config: Config, results: Results) -> lab.Claims:
  return one_step.residual_claims(
    residuals(results),
    {
      'residual_multi_epoch_float64': 'the dual model, trained for many '
      'epochs, predicts what the layer predicts',
      'c14_curve_residual_float64': 'the distance to the attention output '
      'falls to 0 at the last step (it equals its closed form at every step)',
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  # Rounding adds up over the visits of a long float32 run.
  visits = config.dual_epochs * max(config.num_demonstrations)
  single = max(precision.TOLERANCES['float32'], 5e-9 * visits)
  return one_step.residual_summary(
    residuals(results),
    {
      'residual_multi_epoch_float64': precision.TOLERANCES['float64'],
      'residual_multi_epoch_float32': single,
      'c14_curve_residual_float64': CURVE_TOLERANCE,
    },
  )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  agree = ', '.join(
    f'{np.max(found.float64.residual):.0e} (N = {size})'
    for size, found in results.items()
  )
  predictions = lab.Figure(
    'predictions',
    _draw_predictions(results),
    f"""True labels, predictions of the trained attention layer, and predictions
    of its dual model after {config.dual_epochs} epochs of gradient descent with
    batches of one, in float64. Layer and dual model agree to {agree}.
    {learning.MEANING[config.multi_task]}""",
  )
  curves = [
    lab.Figure(
      f'descent_{size}',
      _draw_descent(config, size, found),
      f"""Distance of the dual prediction to the attention output along the
      gradient steps, N = {size}, for {found.once.distances[..., 0].size}
      held-out prompts of {config.num_seeds} seeds, with its closed form, which
      it is to {_curve_residual(found):.0e} (float64). It is 0 at the last step
      and need not fall before.""",
    )
    for size, found in results.items()
  ]
  return [predictions, *curves]


def _draw_predictions(results: Results) -> Any:
  figure, axes = drawing.subplots(
    len(results), 1, figsize=(9, 3.2 * len(results)), squeeze=False
  )
  for axis, (size, found) in zip(axes[:, 0], results.items(), strict=True):
    rows = {
      'true label': found.target,
      'trained layer': found.float64.attention,
      'dual model after gradient descent': found.float64.dual,
    }
    drawing.strip(axis, rows)
    agree = np.max(found.float64.residual)
    axis.set_title(f'N = {size}: layer and dual model agree to {agree:.0e}')
    axis.label_outer()
  axes[0, 0].legend(loc='upper left', handletextpad=0.4, borderaxespad=0)
  return figure


def _draw_descent(config: Config, size: int, found: Descents) -> Any:
  figure, (left, right) = drawing.subplots(1, 2, figsize=(10, 4), sharey=True)
  once, many = found.once, found.float64
  _curves(left, np.arange(size + 1), once.distances, once.predicted, 1)
  left.set_title('one epoch, one demonstration a step')
  left.set_xlabel('demonstrations visited')
  left.set_ylabel('distance to the attention output,\nrelative to the start')
  epochs = np.arange(config.dual_epochs + 1)
  every = max(1, config.dual_epochs // 20)
  measured, closed = many.distances[..., ::size], many.predicted[..., ::size]
  _curves(right, epochs, measured, closed, every)
  right.legend(loc='upper right', handlelength=1.6)
  right.set_title(f'{config.dual_epochs} epochs: linear for every prompt')
  right.set_xlabel('whole epochs')
  return figure


def _curves(axis, steps, distances, predicted, every: int) -> None:
  start = predicted.reshape(-1, predicted.shape[-1])[:, :1]
  measured, closed_form = (
    x.reshape(start.size, -1) / start for x in (distances, predicted)
  )
  lines = axis.plot(steps, measured.T, color=drawing.GREY, lw=0.7, alpha=0.5)
  lines[0].set_label('each prompt')
  mean = measured.mean(axis=0)
  axis.plot(steps, mean, color=drawing.BLUE, lw=3, label='mean, measured')
  look = {'mfc': 'white', 'mew': 1.8, 'ms': 6, 'clip_on': False, 'zorder': 3}
  look |= {'color': drawing.ORANGE, 'label': 'mean, closed form'}
  axis.plot(steps[::every], closed_form.mean(axis=0)[::every], 'o', **look)
  axis.set(ylim=(0, None), xlim=(0, steps[-1]))
  axis.locator_params(axis='x', integer=True)
