"""Identities of implicit finetuning, and metrics on synthetic activations."""

from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import attention, features
from iclcl_jax.accounts import meta_optimizer as account
from iclcl_jax.accounts import meta_optimizer_metrics as metrics

NUM_PROBLEMS, NUM_TOKENS, NUM_QUERY_TOKENS, DIM = 20, 12, 4, 6
NUM_HEADS, NUM_ORDERED = 4, 48
DECAYS = 0.0, 0.1, 0.5, 0.9
CASES = 'noise', 'forgetting', 'shared', 'own'


def _raw_map(in_context, finetuned, zero_shot):
  del zero_shot
  return metrics.map_similarity(_heads(in_context), _heads(finetuned))


def _map_change(in_context, finetuned, zero_shot):
  return metrics.map_update_similarity(
    *(_heads(x) for x in (in_context, finetuned, zero_shot))
  )


def _order(in_context, finetuned, zero_shot):
  del zero_shot
  # Its cost is quadratic: as many tokens as a prompt of a few examples has.
  return metrics.kendall(in_context[:NUM_ORDERED], finetuned[:NUM_ORDERED])


def _heads(x):
  return x.reshape(NUM_HEADS, -1)


METRICS = {
  'SimAOU': metrics.update_similarity,
  'SimAOU, normalised': metrics.normalised_update_similarity,
  'SimAOU, partial': metrics.partial_update_similarity,
  'SimAM': _raw_map,
  'SimAM-delta': _map_change,
  'Kendall': _order,
}


def residuals(seed: int) -> dict[str, Any]:
  """Largest relative errors of the identities over random problems.

  Args:
    seed: root of the random numbers.

  Returns:
    Errors by name.
  """

  def one(key):
    keys = jax.random.split(key, 3)
    stream = jax.random.normal(keys[0], (3, NUM_TOKENS, DIM))
    matrices = jax.random.normal(keys[1], (4, DIM, DIM))
    return _errors(*stream, *matrices, jax.random.normal(keys[2], (DIM,)))

  keys = jax.random.split(jax.random.key(seed), NUM_PROBLEMS)
  return jax.tree.map(jnp.max, jax.lax.map(one, keys))


def _errors(queries, keys, values, wk, wv, dk, dv, query) -> dict[str, Any]:
  phi, last = features.IdentityFeatures(), NUM_QUERY_TOKENS
  update = account.weight_update(keys[:-last], values[:-last])
  weights = account.weight_update(keys[-last:], values[-last:])
  head, changes = account.Head(wk, wv), account.Head(dk, dv)
  tuned = account.finetuned_update(queries, head, changes)
  before = account.weight_update(queries @ wk, queries @ wv)
  after = attention.linear_attention(
    phi, query, queries @ (wk + dk), queries @ (wv + dv)
  )
  mix = account.softmax_mix(query, keys, values, num_query_tokens=last)
  mixed = (1 - mix.share) * mix.zero_shot + mix.share * mix.demonstrations
  whole = attention.softmax_attention(query, keys, values)
  linear = attention.linear_attention(phi, query, keys, values)

  def momentum(decay):
    full = account.momentum_attention(queries, keys, values, decay=decay)
    matrix = account.momentum_matrix(NUM_TOKENS, decay) @ values
    rows = account.momentum_values(values, decay=decay)

    def step(state, token):
      return account.decode(state, *token, decay=decay)

    start = account.start_decoding(NUM_TOKENS, DIM, DIM, dtype=values.dtype)
    decoded = jax.lax.scan(step, start, (queries, keys, values))[1]
    return jnp.maximum(_error(decoded, full), _error(matrix + 1, rows + 1))

  return {
    'dual_form': _error((weights + update) @ query, linear),
    'finetuning': _error((before + tuned) @ query, after),
    'mix': _error(mixed, whole),
    'naive_sum': _error(mix.zero_shot + mix.demonstrations, whole),
    'momentum': jnp.max(jax.lax.map(momentum, jnp.asarray(DECAYS))),
  }


def _error(a: Any, b: Any) -> Any:
  return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def scores(config: Any, seeds: Any) -> dict[str, Any]:
  """All metrics and nulls on all kinds of activations.

  Args:
    config: of the experiment.
    seeds: numbers of the repetitions.

  Returns:
    Arrays `[seeds, cases]` by metric and kind of value; and Rec2FTP of answers
    that have nothing to do with each other.
  """

  def one_seed(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_data, key_null, key_answers = jax.random.split(key, 3)
    zero, *noise = jax.random.normal(
      key_data, (5, config.num_queries, config.width)
    )
    cases = _cases(zero, *noise, config.noise)

    def one_case(case):
      key, one, two = case
      return {
        name: _observe(k, similarity, one, two, zero, config.num_draws)
        for (name, similarity), k in zip(
          METRICS.items(), jax.random.split(key, len(METRICS)), strict=True
        )
      }

    keys = jax.random.split(key_null, len(CASES))
    result = jax.lax.map(one_case, (keys, *cases))
    result['Rec2FTP'] = _recover(key_answers, config)
    return result

  return jax.lax.map(one_seed, seeds)


def _cases(zero, one, two, own, shared, size) -> tuple[Any, ...]:
  """In-context and finetuned outputs of each case, `[cases, Q, d]`."""
  everybody = jnp.broadcast_to(shared[:1], zero.shape)
  changes = (
    (0 * zero, 0 * zero),
    (-0.5 * zero, -0.5 * zero),
    (everybody, everybody),
    (own, own),
  )
  return tuple(
    jnp.stack([zero + pair[side] + size * noise for pair in changes])
    for side, noise in enumerate((one, two))
  )


def _observe(key, similarity, one, two, zero, num_draws) -> dict[str, Any]:
  keys = jax.random.split(key)
  observed = jnp.mean(jax.vmap(similarity)(one, two, zero))
  null = metrics.random_null(
    keys[0], similarity, one, two, zero, num_draws=num_draws
  )
  permuted = metrics.permuted_null(
    keys[1], similarity, one, two, zero, num_draws=num_draws
  )
  return {
    'observed': observed,
    'random': jnp.mean(null),
    'permuted': jnp.mean(permuted),
  }


def _recover(key, config) -> dict[str, Any]:
  """Rec2FTP where all three answer right independently: 30, 50 and 80 %."""
  key_answers, key_null = jax.random.split(key)
  chances = jnp.array([[0.3], [0.5], [0.8]])
  shape = 3, 20 * config.num_queries
  zero, tuned, shown = jax.random.uniform(key_answers, shape) < chances
  found = metrics.recovery(shown, tuned, zero)
  null = metrics.recovery_null(
    key_null, shown, tuned, zero, num_draws=config.num_draws
  )
  return {
    'observed': found.percent,
    'chance': found.chance,
    'lift': found.lift,
    'permuted': jnp.mean(null),
  }
