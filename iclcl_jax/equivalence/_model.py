"""Certificates of whole models: every head at every position of every layer."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _pytree, _validate, precision, transformer
from iclcl_jax._door import door, eager_door
from iclcl_jax.equivalence import _verdict
from iclcl_jax.types import Array, Float, Int, Mask

_LARGEST_CHAIN_ERROR = 0.1


@_pytree.with_short_repr
class ModelResiduals(NamedTuple):
  """Both sides of the identity for a whole model.

  Attributes:
    closed_form, autodiff: backward-stable residual of attention against both
      dual models, see `Residuals`. Shape `[L, H, N]`; 0 at masked positions.
    chain_error: largest relative error of a token's hidden state behind each
      layer of the chain of dual models. Shape `[L]`.
    forward, chain: hidden states of both. Shape `[N, d_model]`.
  """

  closed_form: Float[Array, 'L H N']
  autodiff: Float[Array, 'L H N']
  chain_error: Float[Array, ' L']
  forward: Float[Array, 'N d_model']
  chain: Float[Array, 'N d_model']


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ModelCertificate(_verdict.Judged):
  """The result of `verify_model`.

  Attributes:
    num_layers, num_heads: layers, and heads of all of them together.
    num_positions: tokens `N`, masked ones not counted.
    residuals: what was measured, array by array.
    max_residual_closed_form, max_residual_autodiff: the largest.
    max_chain_error: largest relative error of a hidden state of the chain.
    tolerance, dtype, precision, verdict: as in `Certificate`.
    chain_tolerance: `num_layers` times that, at most 0.1: each layer reads the
      rounding errors of the layers before.
  """

  num_layers: int
  num_heads: int
  num_positions: int
  residuals: ModelResiduals
  max_residual_closed_form: float
  max_residual_autodiff: float
  max_chain_error: float
  chain_tolerance: float

  @property
  def max_residual(self) -> float:
    """The larger one of the two largest residuals; NaN if one is."""
    pair = self.max_residual_closed_form, self.max_residual_autodiff
    return float(np.max(pair))

  def to_dict(self) -> dict[str, Any]:
    """Returns plain Python numbers, strings and lists; no hidden states."""
    result = dict(vars(self))
    arrays = result.pop('residuals')
    return result | {
      'residual_closed_form': arrays.closed_form.tolist(),
      'residual_autodiff': arrays.autodiff.tolist(),
      'chain_error': arrays.chain_error.tolist(),
      'max_residual': self.max_residual,
      'holds': self.holds,
    }

  def _rows(self) -> dict[str, str]:
    sizes = f'{self.num_layers}, {self.num_heads}, {self.num_positions}'
    limit = f'(tolerance {self.tolerance:.0e})'
    chain_limit = f'(tolerance {self.chain_tolerance:.0e})'
    return {
      'title': 'every head = one gradient step',
      'layers, heads, positions': sizes,
      'arithmetic': f'{self.dtype}, {self.precision}',
      'residual of closed form': f'{self.max_residual_closed_form:.1e} {limit}',
      'residual of jax.grad': f'{self.max_residual_autodiff:.1e} {limit}',
      'relative error of chain': f'{self.max_chain_error:.1e} {chain_limit}',
      'verdict': self.verdict,
    }


@door
def model_residuals(
  architecture: transformer.Architecture,
  blocks: transformer.Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
) -> ModelResiduals:
  """Computes attention and both dual models of all heads; can be jitted.

  Layer after layer by `jax.lax.scan`, one key-value head after the other by
  `jax.lax.map`. Heads are compared on the hidden states of the forward pass;
  the chain of dual models runs beside it on its own. Arguments are those of
  :mod:`iclcl_jax.transformer`; `x` are embedded tokens.

  Example:
    >>> architecture, block = transformer.example()
    >>> blocks = jax.tree.map(lambda p: p[None], block)
    >>> model_residuals(
    ...     architecture, blocks, jnp.ones((3, 4))).autodiff.shape
    (1, 2, 3)
  """
  transformer.check_blocks(architecture, blocks, x)
  valid = jnp.ones(x.shape[0], bool) if mask is None else mask
  predict = functools.partial(
    transformer.predict_heads, architecture, positions=positions, mask=mask
  )

  def step(streams, block):
    streams = jnp.where(valid[None, :, None], streams, 0)
    read = functools.partial(transformer.heads, architecture, block)
    heads = jax.vmap(functools.partial(read, positions=positions))(streams)
    answers = jax.vmap(predict)(heads)
    heads = jax.tree.map(lambda x: x[0], heads)
    output, *measured = _check_heads(
      architecture, heads, answers[0], positions, mask
    )
    forward = transformer.complete(architecture, block, streams[0], output)
    own = streams[1], answers[1]
    chain = transformer.complete_dual(architecture, block, *own)
    # The relative error of every token, in the largest coordinate.
    error = jnp.max(jnp.abs(chain - forward), axis=1)
    error = precision.ratio(error, jnp.max(jnp.abs(forward), axis=1))
    measured = [jnp.where(valid, x, 0) for x in (*measured, error)]
    return jnp.stack([forward, chain]), measured

  (forward, chain), (closed_form, autodiff, error) = transformer.scan_blocks(
    architecture, blocks, step, jnp.stack([x, x])
  )
  error = jnp.max(error, axis=1)
  return ModelResiduals(closed_form, autodiff, error, forward, chain)


@eager_door
def verify_model(
  architecture: transformer.Architecture,
  blocks: transformer.Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> ModelCertificate:
  """Checks that every head of a model is one gradient step, at every position.

  And that the whole stack, executed as a chain of dual models, gives the hidden
  states of the forward pass. Runs eagerly; in reduced precision, or in a 16-bit
  dtype, a small residual is 'precision-limited'.

  Arguments are those of `model_residuals`, and the `arithmetic` of `verify`. It
  is a `ValueError` if no token is valid.

  Example:
    >>> architecture, block = transformer.example()
    >>> blocks = jax.tree.map(lambda p: p[None], block)
    >>> verify_model(architecture, blocks, jnp.eye(3, 4)).verdict
    'holds'
  """
  _verdict.check_arithmetic(arithmetic)
  remedy = 'Use equivalence.model_residuals inside jit or vmap.'
  arrays = blocks, x, positions, mask
  _validate.check_concrete('an argument', *arrays, remedy=remedy)
  if mask is not None and not np.any(mask):
    raise ValueError('mask is all False; expected at least one valid token.')
  result = arithmetic.transform(model_residuals)(
    architecture, blocks, x, positions=positions, mask=mask
  )
  return certificate_of(result, mask=mask, arithmetic=arithmetic)


def certificate_of(
  result: ModelResiduals,
  *,
  mask: Mask | None = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> ModelCertificate:
  """Turns what `model_residuals` measured into a certificate.

  `mask` and `arithmetic` are what these were measured with.

  Example:
    >>> architecture, block = transformer.example()
    >>> blocks = jax.tree.map(lambda p: p[None], block)
    >>> result = model_residuals(architecture, blocks, jnp.eye(3, 4))
    >>> certificate_of(result).num_heads
    2
  """
  num_layers, num_heads, size = result.closed_form.shape
  dtype = result.forward.dtype
  tolerance = precision.tolerance(dtype)
  closed_form, autodiff, error = (float(np.max(x)) for x in result[:3])
  reduced = max(tolerance, arithmetic.reduced_tolerance or 0.0)
  if not np.all(np.isfinite([closed_form, autodiff, error])):
    verdict = 'not finite'
  else:
    verdict = _verdict.judge(max(closed_form, autodiff), dtype, arithmetic)
    if verdict != 'fails' and error > _chain_tolerance(num_layers, reduced):
      verdict = 'chain departs'
  return ModelCertificate(
    num_layers=num_layers,
    num_heads=num_layers * num_heads,
    num_positions=size if mask is None else int(np.sum(mask)),
    residuals=result,
    max_residual_closed_form=closed_form,
    max_residual_autodiff=autodiff,
    max_chain_error=error,
    tolerance=tolerance,
    chain_tolerance=_chain_tolerance(num_layers, tolerance),
    dtype=jnp.dtype(dtype).name,
    precision=arithmetic.name,
    verdict=verdict,
  )


def _check_heads(architecture, heads, closed_forms, positions, mask):
  """Returns attention `[H, N, d_k]` and both residuals, `[H, N]` each."""
  where = jnp.arange(closed_forms.shape[1]) if positions is None else positions

  def check(group, closed_form):
    both = jnp.concatenate([group.values, jnp.abs(group.values)], axis=-1)
    outputs = transformer.attend(
      architecture, group._replace(values=both), where, where, mask=mask
    )
    output, terms = jnp.split(outputs, 2, axis=-1)
    scale = jnp.max(terms + jnp.abs(output), axis=-1)
    autodiff = transformer.predict_heads_autodiff(
      architecture, group, positions=positions, mask=mask
    )
    distances = (
      jnp.max(jnp.abs(model - output), axis=-1)
      for model in (closed_form, autodiff)
    )
    return output, *(precision.ratio(x, scale) for x in distances)

  # One key-value head and the query heads that share it at a time.
  apart = jax.tree.map(
    lambda x: x.reshape(len(heads.keys), -1, *x.shape[1:]),
    (heads._replace(window=None), closed_forms),
  )
  checked = jax.lax.map(
    lambda x: check(x[0]._replace(window=heads.window), x[1]), apart
  )
  return [jax.lax.collapse(x, 0, 2) for x in checked]


def _chain_tolerance(num_layers: int, tolerance: float) -> float:
  return min(num_layers * tolerance, _LARGEST_CHAIN_ERROR)
