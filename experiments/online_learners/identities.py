"""Is each recurrence, and its parallel form, its inner learner?"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from iclcl_jax import attention, features, losses
from iclcl_jax.accounts import online_learners as learners

EXACT = 1e-12
MOMENTUM = 0.5


class Results(NamedTuple):
  """Distances of the forms.

  Attributes:
    residuals: by learner, the largest difference between its definition and
      its other forms, over the largest output, in float64.
  """

  residuals: Mapping[str, float]


@lab.float64_on_host()
@jax.default_matmul_precision('highest')
def measure(config: Any) -> Results:
  """Compares every form on one random stream, from a random start."""
  rng = np.random.default_rng(config.seed)
  size, width = 2 * config.max_length, config.dim
  arrays = rng.normal(size=(3, size, width)) / width**0.5
  tokens = learners.stream(
    features.IdentityFeatures(), *(jnp.asarray(x) for x in arrays)
  )
  rates, decays = jnp.asarray(rng.uniform(0.2, 1, size=(2, size)))
  initial = jnp.asarray(rng.normal(size=(width, width)))
  forms = _forms(initial, rates, decays)

  @lab.compile_quickly
  def outputs(tokens):
    return {
      name: [fn(tokens, **options) for fn, options in pairs]
      for name, pairs in forms.items()
    }

  return Results(
    {
      name: float(
        max(np.max(np.abs(other - first)) for other in others)
        / np.max(np.abs(first))
      )
      for name, (first, *others) in jax.device_get(outputs(tokens)).items()
    }
  )


def _forms(
  initial, rates, decays
) -> dict[str, list[tuple[Callable[..., Any], dict[str, Any]]]]:
  """By learner, its definition and then its other forms, with arguments."""
  squared = functools.partial(learners.descend, loss=losses.squared)
  linear, delta = learners.linear_recurrence, learners.delta_recurrence
  chunked = learners.linear_parallel, learners.delta_parallel
  start = {'initial': initial}
  gate, both = start | {'decays': decays}, start | {'rates': rates}
  ridge = {'ridge': 0.1}
  return {
    'linear attention': [
      (f, start) for f in (learners.descend, linear, chunked[0])
    ],
    'decay': [(f, gate) for f in (learners.descend, linear, chunked[0])],
    'vector gate': [
      (f, start | {'decays': decays[:, None] ** rates[None, : len(initial)]})
      for f in (learners.descend, linear)
    ],
    'delta rule': [(f, both) for f in (squared, delta, chunked[1])],
    'gated delta rule': [
      (f, both | gate) for f in (squared, delta, chunked[1])
    ],
    'momentum': [
      (learners.descend, {'momentum': MOMENTUM}),
      (_momentum_attention, {}),
    ],
    'least squares (mesa)': [
      (f, ridge)
      for f in (learners.least_squares, learners.recursive_least_squares)
    ],
    'softmax': [
      (functools.partial(_over_prefixes, attend), {})
      for attend in (attention.softmax_attention, learners.softmax_recurrence)
    ],
  }


def _momentum_attention(tokens: learners.Stream) -> jax.Array:
  weights = learners.momentum_attention_weights(tokens.keys.shape[0], MOMENTUM)
  return (weights * (tokens.queries @ tokens.keys.T)) @ tokens.values


def _over_prefixes(
  attend: Callable[..., jax.Array], tokens: learners.Stream
) -> jax.Array:
  """Lets every query attend to the tokens up to its own."""
  seen = jnp.tril(jnp.ones((len(tokens.keys),) * 2, bool))

  def answer(query, mask):
    return attend(query, tokens.keys, tokens.values, mask=mask)

  return jax.vmap(answer)(tokens.queries, seen)


def claims(config: Any, results: Results) -> list[lab.Claim]:
  del config
  return [
    lab.Claim(
      id=f'online-learners-{name}',
      source='iclcl_jax.accounts.online_learners',
      claim=f'{name}: recurrence and parallel form are the inner learner',
      statistic='largest difference of the forms over the largest output, '
      f'float64; at most {EXACT:g}',
      estimate=lab.exactly(residual),
      at_most=EXACT,
    )
    for name, residual in results.residuals.items()
  ]


def summary(config: Any, results: Results) -> dict[str, Any]:
  del config
  return {'residuals_float64': results.residuals}


PART = lab.Part(measure, claims, summary=summary)
