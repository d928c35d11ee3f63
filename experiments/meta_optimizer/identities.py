"""Are the identities of implicit finetuning identities?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import lab
from iclcl_jax import attention, features
from iclcl_jax.accounts import meta_optimizer as account

NUM_PROBLEMS, NUM_TOKENS, NUM_QUERY_TOKENS, DIM = 20, 12, 4, 6
DECAYS = 0.0, 0.1, 0.5, 0.9
EXACT = 1e-12
DAI = 'Dai et al., arXiv:2212.10559'
IDENTITIES = (
  ('dual_form', DAI, 'demonstrations add to the weights of linear attention'),
  ('finetuning', DAI, 'finetuned keys and values add to those weights'),
  ('mix', 'derived here', 'softmax attention is a convex mix of two parts'),
  ('momentum', DAI, 'momentum attention is a recurrence'),
  (  # Which the mix is mistaken for.
    'sum',
    f'{DAI}, with the softmax',
    'softmax attention is the SUM of zero-shot part and demonstrations',
  ),
)
Errors = Mapping[str, Any]  # Relative, the largest over problems, by name.


@lab.float64_on_host()
@jax.default_matmul_precision('highest')
def measure(config: Any) -> Errors:

  def one(key):
    keys = jax.random.split(key, 3)
    stream = jax.random.normal(keys[0], (3, NUM_TOKENS, DIM))
    matrices = jax.random.normal(keys[1], (4, DIM, DIM))
    return _errors(*stream, *matrices, jax.random.normal(keys[2], (DIM,)))

  @lab.compile_quickly
  def largest():
    keys = jax.random.split(jax.random.key(config.seed), NUM_PROBLEMS)
    return jax.tree.map(jnp.max, jax.lax.map(one, keys))

  return jax.device_get(largest())


def _errors(queries, keys, values, wk, wv, dk, dv, query) -> Errors:
  """Errors on one problem; `wk`, `wv` are finetuned by `dk`, `dv`."""
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
    """Token by token, as a matrix, and as new values."""
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
    'momentum': jnp.max(jax.lax.map(momentum, jnp.asarray(DECAYS))),
    'sum': _error(mix.zero_shot + mix.demonstrations, whole),
  }


def _error(a: Any, b: Any) -> Any:
  return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def claims(config: Any, errors: Errors) -> list[lab.Claim]:
  del config
  more = {'sum': ' (largest over random problems)'}
  return [
    lab.Claim(
      id=f'meta-optimizer-{name.replace("_", "-")}',
      source=source,
      claim=text,
      statistic=f'largest relative error, float64; at most {EXACT:g}'
      + more.get(name, ''),
      estimate=errors[name],
      at_most=EXACT,
    )
    for name, source, text in IDENTITIES
  ]


def summary(config: Any, errors: Errors) -> dict[str, Any]:
  del config
  return {
    'dual_form_residual_float64': errors['dual_form'],
    'finetuning_residual_float64': errors['finetuning'],
    'mix_residual_float64': errors['mix'],
    'momentum_recurrence_residual_float64': errors['momentum'],
    'naive_sum_error': errors['sum'],
  }


PART = lab.Part(measure, claims, summary=summary)
