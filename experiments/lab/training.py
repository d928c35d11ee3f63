"""Training with optax on batches that are drawn one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def train(
  loss_fn: Callable[[Any, Any], jax.Array],
  params: Any,
  draw_fn: Callable[[Any], tuple[Any, Any]],
  source: Any,
  optimizer: optax.GradientTransformation,
  *,
  num_steps: int,
  record_every: int,
) -> Any:
  """Takes steps of an optimizer, and keeps the weights every now and then.

  A pure function: `jax.vmap` or `jax.lax.map` trains several runs.

  Args:
    loss_fn: `(params, batch) -> []`.
    params: the weights before training.
    draw_fn: `source -> (source, batch)`, where the batches come from.
    source: state of the source before the first batch.
    optimizer: of optax.
    num_steps: number of steps, a multiple of `record_every`.
    record_every: steps between records.

  Returns:
    The weights with a leading axis of records, the first before training, the
    last after it.
  """

  def step(carry, _):
    params, state, source = carry
    source, batch = draw_fn(source)
    gradient = jax.grad(loss_fn)(params, batch)
    with jax.numpy_dtype_promotion('standard'):  # Optax needs it.
      updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state, source), None

  def block(carry, _):
    carry, _ = jax.lax.scan(step, carry, length=record_every)
    return carry, carry[0]

  carry = params, optimizer.init(params), source
  _, records = jax.lax.scan(block, carry, length=num_steps // record_every)
  return jax.tree.map(
    lambda w, r: jnp.concatenate([w[None], r]), params, records
  )
