"""Does the published bound say how far the target moves?"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.softmax_regression.one_step import LI, statements
from iclcl_jax.accounts import softmax_regression as account

RADII = 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0
REPORTED = RADII.index(1.5)
NUM_WORDS, WIDTH = 20, 5
NUM_PAIRS = 2000


class Results(NamedTuple):
  """Moves of the prediction over moves of the weights, and bounds. `[K]`."""

  observed: Any  # The largest ratio.
  share: Any  # The largest ratio relative to each document's own constant.
  true: Any  # The constant of all documents of that norm.
  log_published: Any  # Logarithm of the published bound.
  log_chained: Any  # Logarithm of the bound to which its lemmas lead.


@lab.float64_on_host()
def measure(config: Config) -> Results:
  """Searches the largest ratio for each radius.

  Over `NUM_PAIRS` documents and weights of that norm, some of whose words stand
  out, for a small move of the weights that moves the prediction most.
  """

  def one(key, radius):
    keys = jax.random.split(key, 3)
    document = jax.random.normal(keys[0], (NUM_WORDS, WIDTH))
    loud = jnp.arange(NUM_WORDS) < 2  # Two words that compete: the worst case.
    share = jax.random.uniform(keys[2])
    document = document * jnp.where(loud, 1.0, share)[:, None]
    document = document * (radius / jnp.linalg.norm(document, 2))
    x = jax.random.normal(keys[1], (WIDTH,))
    x = x * (radius / jnp.linalg.norm(x))
    prediction = account.predict(document, x)
    slope = jax.vmap(account.apply_jacobian, in_axes=(None, 1), out_axes=1)(
      prediction, document
    )
    move = 1e-4 * jnp.linalg.svd(slope, full_matrices=False)[2][0]
    change = account.predict(document, x + move) - prediction
    ratio = jnp.linalg.norm(change) / jnp.linalg.norm(move)
    return ratio, ratio / account.lipschitz_in_weights(document)

  def at(radius):
    keys = jax.random.split(jax.random.key(config.seed), NUM_PAIRS)
    ratio, share = jax.vmap(one, in_axes=(0, None))(keys, radius)
    return Results(
      jnp.max(ratio),
      jnp.max(share),
      radius / 2,
      account.log_published_bound(NUM_WORDS, radius),
      # What the lemmas give: 4 R n^1.5 exp(4 R^2).
      jnp.log(4 * radius * NUM_WORDS**1.5) + 4 * radius**2,
    )

  return lab.compute_each(at, jnp.asarray(RADII))


def gap(results: Results) -> float:
  """Decades from the largest ratio to the bound, where they are fewest."""
  gaps = results.log_published - np.log(results.observed)
  return float(np.min(gaps)) / math.log(10)


def claims(config: Config, results: Results) -> list[lab.Claim]:
  over = 'log10 of M over the largest observed ratio, smallest over radii'
  return statements(
    f"""
    bound-holds [{LI}, main theorem] the target moves by at most M times the
      move of the weights | {over}
    bound-informs [{LI}, reading of the main theorem] M says how far the target
      moves, to a factor of 10 | {over}
    true-constant [derived here] the target moves by at most |PA| / 2 times the
      move of the weights | largest observed share of that
    """,
    {
      'bound-holds': lab.at_least(0, gap(results)),
      'bound-informs': lab.at_most(1, gap(results)),
      'true-constant': lab.at_most(1 + 1e-6, np.max(results.share)),
    },
  )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(8, 4.6))
  decades = np.log(10)
  for y, look, colour, label in (
    (results.log_published, 'v-', drawing.ORANGE, 'published bound M'),
    (results.log_chained, '^-.', drawing.GREEN, 'where its lemmas lead'),
    (np.log(results.true), 's--', drawing.BLUE, 'true constant R / 2'),
    (np.log(results.observed), 'o:', drawing.BLACK, 'largest observed'),
  ):
    axis.plot(RADII, y / decades, look, color=colour, label=label, mfc='white')
  axis.set_yscale('symlog', linthresh=2)
  axis.set_xlabel('radius R (norm of document and weights)')
  axis.set_ylabel("log10 of |f - f'| / |x - x'|")
  ticks = [-1, 0, 1, 2, 10, 100]
  axis.set_yticks(ticks, [str(tick) for tick in ticks])
  axis.legend()
  caption = f"""How far a prediction moves for a move of the weights of size
    one: the published bound, the constant to which its lemmas lead, the true
    constant, and the largest observed ratio (n = {NUM_WORDS}, d = {WIDTH}, at
    most {np.max(results.share):.2f} of the constant of the same document). The
    vertical axis is linear between -2 and 2, logarithmic beyond."""
  return [lab.Figure('bound', figure, caption)]


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'lipschitz_radius': RADII[REPORTED],
    'lipschitz_observed': results.observed[REPORTED],
    'lipschitz_true_bound': results.true[REPORTED],
    'log_published_bound': results.log_published[REPORTED],
  }
