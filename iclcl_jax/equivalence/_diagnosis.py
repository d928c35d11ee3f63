"""What outputs are that fail their certificate: guesses, tried on numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import attention, moments
from iclcl_jax._program import compiled

# Queries of one key-value head that are looked at together.
_CHUNK_SIZE = 8
_CONTRASTIVE = 'loss=losses.contrastive, learning_rate=1.0'
_MULTIPLE = (
  'each output is a multiple of what it should be: the weights do not sum to '
  'one (a gate, an attention sink)'
)
_NO_MEAN = (
  'an output is no mean of the values that its query sees: the axes may be '
  '[B, H, T, D], where [B, T, H, D] is expected, dropout is on, the weights do '
  'not sum to one, it learns by another loss: state it by loss=, or the arrays '
  'do not belong together'
)
_OTHER_MEAN = (
  'the output is a mean of the visible values with other weights: state a bias '
  'of the scores by bias=, another activation or a cap by a kernel phi=, what '
  'else it learns by as loss='
)


def diagnose(phi, heads, stretch: float, residual: np.ndarray, limit) -> str:
  """Says what the outputs of failing heads are instead, if a guess fits.

  `phi` is the kernel that was stated, `stretch` the scale times `sqrt(d_k)`;
  `heads` are keys, values and rows. The residual of each query, and what
  rounding explains of it, have shape `[B, N, T]`.
  """
  failing = np.any(residual > limit, axis=(0, 2))
  distances = jax.device_get(_distances(phi, heads, stretch, limit.shape[1]))
  fits = {
    guess: bool(np.all((np.reshape(x, limit.shape) <= limit)[:, failing]))
    for guess, x in distances.items()
  }
  is_multiple, is_mean = fits.pop(_MULTIPLE), fits.pop(_OTHER_MEAN)
  guesses = _CONTRASTIVE, *fits  # First what changes nothing else.
  found = [f'the output is that of {guess}' for guess in guesses if fits[guess]]
  rest = _MULTIPLE if is_multiple else _OTHER_MEAN if is_mean else _NO_MEAN
  return (*found, rest)[0]


def map_rows(measure, heads):
  """Maps `(keys, values, row)`, one key-value head after the other."""

  def of_head(head):
    keys, values, rows = head
    row = functools.partial(measure, keys, values)
    return moments.map_chunks(row, rows, _CHUNK_SIZE)

  return jax.lax.map(of_head, heads)


@compiled
def _distances(phi, heads, stretch, num_heads: int):
  """Returns how far each guess is from each output, `[C, rows]`."""
  return map_rows(functools.partial(_of_row, phi, stretch, num_heads), heads)


def _of_row(phi, stretch, num_heads, keys, values, row):
  keys, values = jnp.nan_to_num(keys), jnp.nan_to_num(values)  # Hidden ones.
  (size, width), where = keys.shape, jnp.arange(keys.shape[0])
  raw = keys @ row.query / stretch
  bias = jnp.zeros_like(raw) if row.bias is None else row.bias
  seen = jnp.ones(size, bool) if row.mask is None else row.mask
  stated = raw * (stretch / width**0.5) + bias
  slope = 2 ** (-8 * (row.head + 1).astype(raw.dtype) / num_heads)
  alibi = slope * jnp.abs(where - row.position).astype(raw.dtype)
  query, *_ = features = jax.nn.elu(jnp.stack([row.query / stretch, *keys])) + 1

  def mean(scores, seen=seen):
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return weights @ values

  def seeing(seen):
    """What `phi` answers under another mask."""
    if row.bias is not None:
      return mean(stated, seen)
    return attention.weights(phi, row.query, keys, mask=seen) @ values

  guesses = {
    _CONTRASTIVE: seeing(seen),
    'phi=kernels.ExponentialKernel(), the exact softmax': mean(stated),
    'phi=features.EluPlusOneFeatures()': mean(jnp.log(features[1:] @ query)),
    'a ReLU, phi=lambda x, y: jax.nn.relu(x @ y)': mean(
      jnp.log(jax.nn.relu(raw))
    ),
    'is_causal=True': seeing(seen & (where <= row.position)),
    'mask=None, is_causal=False': seeing(seen | True),
    'mask=~mask': seeing(~seen) if row.mask is not None else jnp.nan,
    'bias=None': mean(stated - bias) if row.bias is not None else jnp.nan,
    'ALiBi, bias=-2 ** (-8 * n / N) * abs(t - s)': mean(stated - alibi),
    'scale=None': mean(raw / width**0.5 + bias),
    'scale=1.0': mean(raw + bias),
    'scale=1 / d_k': mean(raw / width + bias),
    'scale=1 / sqrt(N * d_k)': mean(raw / (num_heads * width) ** 0.5 + bias),
  }
  for cap in (20, 30, 50):
    capped = f'log_kernel {cap} * tanh(x @ y / d_k**0.5 / {cap})'
    guesses[f'a cap, phi with {capped}'] = mean(cap * jnp.tanh(stated / cap))
  right = mean(stated)
  factor = row.output @ right / (right @ right)
  guesses[_MULTIPLE] = (factor if values.shape[1] > 1 else jnp.nan) * right
  guesses[_OTHER_MEAN] = jnp.clip(
    row.output,
    jnp.min(jnp.where(seen[:, None], values, jnp.inf), axis=0),
    jnp.max(jnp.where(seen[:, None], values, -jnp.inf), axis=0),
  )
  sizes = jnp.max(jnp.abs(values), axis=0) + jnp.abs(row.output)
  return {
    guess: jnp.where(
      jnp.any(seen), jnp.max(jnp.abs(x - row.output) / jnp.max(sizes)), 0
    )
    for guess, x in guesses.items()
  }
