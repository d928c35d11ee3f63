"""Vocabulary: axes, array aliases, protocols and the state of a dual model.

Axes, used in every signature of the library (rows are tokens):

=========  ==============================================================
``N``      demonstrations (or, in causal code, positions), at least one
``n``      the same where there may be none
``M``      queries
``R``      features
``d_k``    width of queries and keys
``d_v``    width of values
=========  ==============================================================

Core functions take ONE sequence and ONE head; :func:`jax.vmap` makes batches
and heads.
"""

from collections.abc import Callable
from typing import (
  TYPE_CHECKING,
  Any,
  NamedTuple,
  Protocol,
  TypeAlias,
  runtime_checkable,
)

from jaxtyping import (
  Array as Array,
  Bool as Bool,
  Float as Float,
  Int as Int,
  PRNGKeyArray as PRNGKeyArray,
)

from iclcl_jax import _pytree
from iclcl_jax._pytree import dataclass as dataclass, static as static

Mask: TypeAlias = Bool[Array, ' N']
Vector: TypeAlias = Float[Array, ' d_k']

# `(phi, query, keys, values) -> [d_v]`, with a keyword `mask` if there is one.
AttentionFn: TypeAlias = Callable[..., Array]
# `(predictions [N, d_v], values [N, d_v]) -> []`.
Loss: TypeAlias = Callable[..., Array]
# `(weights [d_v, R]) -> []`.
Penalty: TypeAlias = Callable[[Array], Array]
# Of optax, which is not loaded before it is used.
if TYPE_CHECKING:
  import optax

  Optimizer: TypeAlias = optax.GradientTransformation
else:
  Optimizer = Any
# `(key, num_features, dim, *, dtype) -> [R, d]`.
Projection: TypeAlias = Callable[..., Array]
# `(queries [N, d_k], keys [N, d_k], values [N, d_v]) -> [N, d_v]`.
SequenceAttentionFn: TypeAlias = Callable[[Array, Array, Array], Array]
# `(tokens [N, d_model]) -> [N, d]`: keys or values made of tokens.
View: TypeAlias = Callable[[Array], Array]
# `(weights [N], candidates [N], count) -> bool [N]`.
Selection: TypeAlias = Callable[[Array, Array, int | Array], Array]


@runtime_checkable
class FeatureMap(Protocol):
  r"""A map :math:`\phi` whose inner products are a kernel.

  Implementations are pytrees, so that `jit`, `vmap` and `grad` reach the
  arrays inside (a random projection, say).
  """

  def __call__(self, x: Vector) -> Float[Array, ' R']:
    """Returns the features `phi(x)`. They may under- or overflow."""
    ...

  def scaled(self, x: Vector) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
    """Returns `(log_scale, features)`, `phi(x) = exp(log_scale) * features`.

    `log_scale` has shape `[R]` or `[1]`. A map may have a second tower
    `scaled_query(x)` of the same form, by which queries are read: keys train
    the same weights, and `W` answers through another encoder. Without it both
    sides are the same.
    """
    ...


@runtime_checkable
class Kernel(Protocol):
  """A symmetric function `k(x, y)`.

  Positive ones also have `log_kernel(x, y)`, the logarithm, shape `[]`.
  """

  def __call__(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns `k(x, y)`."""
    ...


@_pytree.with_short_repr
class DualState(NamedTuple):
  r"""A trained dual model, for every query at once.

  The model is :math:`f(x) = W\phi(x) / (z^\top\phi(x))` with
  `W = weights * exp(log_scale)` and `z = mass * exp(log_scale)`: column `r`
  is stored relative to the largest contribution that feature `r` has
  received, so nothing under- or overflows.

  Attributes:
    weights: trained weights, scaled. Shape `[d_v, R]`.
    mass: sum of the features of all visible tokens, scaled. Shape `[R]`.
    log_scale: running maximum of the log-features. Shape `[R]`.

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 (weights); Rabe & Staats,
    arXiv:2112.05682 (running maximum).
  """

  weights: Float[Array, 'd_v R']
  mass: Float[Array, ' R']
  log_scale: Float[Array, ' R']


@_pytree.with_short_repr
class KernelDualState(NamedTuple):
  r"""The exact-kernel twin of `DualState`: coefficients over the keys.

  The model is :math:`f(x) = \sum_i c_i k(k_i, x) / \sum_i m_i k(k_i, x)`. It
  grows by a row for every token. One of fixed capacity (`dual.empty`) writes
  tokens into free rows, and can be the carry of a `lax.scan`.

  Attributes:
    keys: training inputs seen so far. Shape `[n, d_k]`.
    coefficients: weights of the kernel expansion. Shape `[n, d_v]`.
    mass: 1 for a visible token, 0 for a masked or removed one and a free row.
      Shape `[n]`.
    used: how many rows of a fixed capacity are taken, shape `[]`; None for a
      state that grows.
  """

  keys: Float[Array, 'n d_k']
  coefficients: Float[Array, 'n d_v']
  mass: Float[Array, ' n']
  used: Int[Array, ''] | None = None


State: TypeAlias = DualState | KernelDualState


@_pytree.with_short_repr
class Reading(NamedTuple):
  """What a query finds: `W phi(q) = numerator * exp(log_scale)`.

  And `z . phi(q)`, the denominator, on the same scale.
  """

  numerator: Float[Array, ' d_v']
  denominator: Float[Array, '']
  log_scale: Float[Array, '']


class Form(Protocol):
  """The arithmetic of a dual model: how its sums over tokens are kept.

  Two modules follow it. :mod:`iclcl_jax.moments` sums features (the state is a
  `DualState`), :mod:`iclcl_jax.coefficients` keeps a row for each token of an
  exact kernel (a `KernelDualState`); `forms.form_of` tells which. States of one
  form merge. Readings of any forms merge, if the query is the same. Rows are
  keys `[N, d_k]` and values `[N, d_v]`; `weights` are what `get_weights` gives.

  Attributes:
    empty: `(phi, keys, values, capacity=None) -> state`. The state that has
      seen nothing, with room for so many rows; widths and dtype are read.
    absorb: `(phi, state, keys, values, mask=None, chunk_size=None) -> state`.
      Adds `v_i phi(k_i)^T` to the weights and `phi(k_i)` to the mass, and holds
      the features of one chunk at a time; None for all at once.
    merge: `(a, b) -> state`. Adds states that saw different tokens.
    remove: `(phi, state, key [d_k], label [d_v]) -> (state, growth [])`.
      Removes a token; `growth` is that of the rounding errors.
    read: `(phi, state, query [d_k]) -> Reading`.
    score_terms: `(phi, query, keys, mask=None) -> ([N, _], log_scale [])`. The
      scaled `phi(k_i) . phi(q)`, feature by feature if there are.
    causal_sums: `(phi, queries [N, d_k], keys, values, chunk_size, mask=None,
      start=None) -> [N, d_v + 2]`. What each position reads of the state
      `start` and the tokens up to itself: sums of scored values, sum of scores,
      score of the own key. Each row has a scale of its own.
    gradient: `(phi, state, keys, values, rows, mask, loss) -> weights`.
    penalty_gradient: `(phi, state, penalty) -> weights`.
    get_weights: `(state) -> weights`.
    with_weights: `(state, weights) -> state`.
  """

  empty: Callable[..., Any]
  absorb: Callable[..., Any]
  merge: Callable[..., Any]
  remove: Callable[..., tuple[Any, Array]]
  read: Callable[..., Reading]
  score_terms: Callable[..., tuple[Array, Array]]
  causal_sums: Callable[..., Array]
  gradient: Callable[..., Array]
  penalty_gradient: Callable[..., Array]
  get_weights: Callable[..., Array]
  with_weights: Callable[..., Any]
