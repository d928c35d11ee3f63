"""Streams of tokens, and the definition of a learner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, losses
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, FeatureMap, Float, Loss


class Stream(NamedTuple):
  """A stream of tokens: values, and features of queries and keys."""

  queries: Float[Array, 'N R']
  keys: Float[Array, 'N R']
  values: Float[Array, 'N d_v']


@door
def stream(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
) -> Stream:
  """Applies a feature map to queries and keys.

  `features.IdentityFeatures()` leaves them as they are.
  """
  return Stream(jax.vmap(phi)(queries), jax.vmap(phi)(keys), values)


@door
@widened
def descend(
  tokens: Stream,
  *,
  loss: Loss = losses.contrastive,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  momentum: float | Array = 0.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""Learns by one gradient step for each token: the definition.

  .. math:: \tilde W = W_{t-1} \odot g_t, \quad
     M_t = \mu M_{t-1} - \beta_t \nabla_W\, L(\tilde W\phi(k_t), v_t),
     \quad W_t = \tilde W + M_t

  Args:
    tokens: the stream.
    loss: inner loss `loss(predictions [1, d_v], values [1, d_v]) -> []`.
    rates: step sizes `beta`, one or one for each token.
    decays: factors `g` of the state, one, one for each token, or one for each
      token and feature.
    momentum: the factor `mu` of the heavy ball, in `[0, 1)`.
    initial: the state before the first token. Shape `[d_v, R]`; None for 0.

  Example:
    >>> x = jnp.eye(2)
    >>> descend(Stream(x, x, x)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

  References:
    Sun et al., arXiv:2407.04620, section 2 (layers as inner learners).
  """
  losses.check_loss(loss)
  _validate.below_one(momentum=momentum)
  start = initial_state(tokens, initial)
  rates, decays = broadcast_gates(tokens, rates, decays)

  def step(carry, token):
    weights, speed = carry
    query, key, value, rate, decay = token
    weights = weights * decay[None]

    def inner(weights):
      return loss((weights @ key)[None], value[None])

    speed = momentum * speed - rate * jax.grad(inner)(weights)
    weights = weights + speed
    return (weights, speed), weights @ query

  carry = start, jnp.zeros_like(start)
  return jax.lax.scan(step, carry, (*tokens, rates, decays))[1]


def broadcast_gates(
  tokens: Stream, rates: Any, decays: Any
) -> tuple[Float[Array, ' N'], Array]:
  """Returns step sizes `[N]`, and decays `[N, 1]` or `[N, R]`."""
  size, width = tokens.keys.shape
  rates = _as_gate('rates', rates, tokens, [(), (size,)])
  decays = _as_gate('decays', decays, tokens, [(), (size,), (size, width)])
  if decays.ndim < 2:
    decays = jnp.broadcast_to(decays, (size,))[:, None]
  return jnp.broadcast_to(rates, (size,)), decays


def _as_gate(name: str, value: Any, tokens: Stream, shapes) -> Array:
  try:
    gate = jnp.asarray(value, tokens.keys.dtype)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{name} is {value!r}; expected a number or an array of numbers.'
    ) from error
  if gate.shape not in shapes:
    expected = ' or '.join(str(list(shape)) for shape in shapes)
    raise ValueError(
      f'{name} has shape {list(gate.shape)}; expected {expected}: one, or one '
      'for each token.'
    )
  return gate


def initial_state(tokens: Stream, initial: Array | None) -> Array:
  """Returns the state before the first token: 0 unless one is given."""
  if initial is None:
    shape = tokens.values.shape[1], tokens.keys.shape[1]
    initial = jnp.zeros(shape, tokens.values.dtype)
  return vary_as(initial, tokens)
