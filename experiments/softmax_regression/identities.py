"""Are the closed forms and identities of softmax regression exact?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import lab
from experiments.lab import Config
from experiments.softmax_regression.one_step import LI, statements
from iclcl_jax.accounts import softmax_regression as account

NUM_PROBLEMS, SIZE = 50, (12, 5)
EXACT = 1e-11
Errors = Mapping[str, Any]  # Relative, the largest over problems.


def measure(config: Config) -> Errors:
  def one(key):
    keys = jax.random.split(key, 3)
    document = jax.random.normal(keys[0], SIZE)
    target = jax.nn.softmax(3 * jax.random.normal(keys[1], SIZE[:1]))
    old, new = jax.random.normal(keys[2], (2, SIZE[1]))
    return _errors(account.Problem(document, target), old, new)

  return lab.largest_errors(one, config.seed, NUM_PROBLEMS)


def _errors(posed: account.Problem, old: Any, new: Any) -> Errors:
  ours = account.gradients(posed, old)
  theirs, slope = jax.grad(account.loss, argnums=(0, 1))(posed, old)
  pairs = (
    (ours.weights, slope),
    (ours.document, theirs.document),
    (ours.target, theirs.target),
  )
  curvature = jax.hessian(account.loss, argnums=1)(posed, old)
  before = account.predict(posed.document, old)
  after = account.predict(posed.document, new)
  target = account.shifted_target(posed.target, before, after)
  moved = account.smallest_data_shift(posed.document, old, new)
  step = account.weight_shift(posed, jnp.zeros_like(old), learning_rate=3.0)
  return {
    'gradient': jnp.max(jnp.stack([lab.distance(*pair) for pair in pairs])),
    'hessian': lab.distance(account.hessian(posed, old), curvature),
    'target_shift': lab.distance(after - posed.target, before - target),
    'data_shift': lab.distance(account.predict(moved, old), after),
    'linear_attention': lab.distance(
      account.attend(posed, posed.document, learning_rate=3.0),
      posed.document @ step,
    ),
  }


def claims(config: Config, errors: Errors) -> list[lab.Claim]:
  error = 'largest relative error, float64'
  return statements(
    f"""
    gradient [derived here] the closed forms are the three gradients | {error}
    hessian [derived here] the closed form is the Hessian | {error}
    target-shift [{LI}, main theorem] a shift of the weights is a shift of the
      target | {error}
    data-shift [derived here] a rank-one shift of the document does exactly what
      a shift of the weights does | {error}
    linear-attention [derived here] the first gradient step from 0 is linear
      attention over the words | {error}
    """,
    {k.replace('_', '-'): lab.at_most(EXACT, x) for k, x in errors.items()},
  )


def summary(config: Config, errors: Errors) -> dict[str, Any]:
  names = 'gradient', 'hessian'
  return {f'{name}_residual_float64': errors[name] for name in names}
