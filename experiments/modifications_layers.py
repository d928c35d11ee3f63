r"""The modified layers of `experiments.modifications`, in their fast form.

Each layer is a pure function of its parameters, its settings (numbers that
stack, so that `jax.vmap` runs many settings at once) and one prompt. Only the
query's label is predicted, so only the query's row of scores and the label
column of the value projection are ever computed; the functions of
`iclcl_jax.modified` are the definitions.

References:
  Ren & Liu, arXiv:2310.13220, section 4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from experiments import pretraining
from iclcl_jax.types import Array, Float, PRNGKeyArray


class Prompt(NamedTuple):
  """What a layer reads.

  Attributes:
    tokens: demonstrations, then the query. Shape `[n, d_model]`.
    noise: a random number for each token. Shape `[n]`.
  """

  tokens: Float[Array, 'n d_model']
  noise: Float[Array, ' n']


PredictFn: TypeAlias = Callable[[Any, Any, Array, Prompt], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Layers of one structure, which train in one `vmap`.

  Attributes:
    names: of the layers.
    settings: a NamedTuple of arrays with a leading axis of layers.
    init: `(key, run) -> (params, directions)`, shared by the layers.
    predict: `(params, settings, directions, prompt) -> prediction [d_y]`.
    num_params: trained numbers of each layer.
  """

  names: tuple[str, ...]
  settings: Any
  init: Callable[[PRNGKeyArray, pretraining.Run], tuple[Any, Array]]
  predict: PredictFn
  num_params: tuple[int, ...]


def query_weights(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'n d_k'],
  directions: Float[Array, 'R d_k'],
  scale: float | Array,
) -> Float[Array, ' n']:
  r"""Attention weights of one query, with the features never formed.

  Args:
    query: the query.
    keys: the keys.
    directions: of the positive random features.
    scale: :math:`d_k^{-1/4}`.

  Returns:
    Weights that sum to 1. Shape `[n]`.
  """
  keys, query = keys * scale, query * scale
  exponents = (keys + query[None]) @ directions.T
  log_scores = jax.nn.logsumexp(exponents, axis=1) - jnp.sum(keys**2, 1) / 2
  return jax.nn.softmax(log_scores)


def read(params, tokens) -> tuple[Array, Array, Array]:
  """Query of the last token, keys and label values of all tokens."""
  return tokens[-1] @ params.query, tokens @ params.key, tokens @ params.value


def scale_of(query: Array) -> float:
  """The factor of queries and keys, from the width of a query."""
  return query.shape[0] ** -0.25


def draw_matrix(key, *shape) -> Array:
  """Entries from N(0, 1 / fan-in)."""
  return jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5


class RegularisedParams(NamedTuple):
  """The layer, and the matrix of a residual path of its own.

  Attributes:
    query: shape `[d_model, d_k]`.
    key: shape `[d_model, d_k]`.
    value: label columns of the value projection. Shape `[d_model, d_y]`.
    residual: of the untied residual path. Shape `[d_model, d_y]`.
  """

  query: Float[Array, 'd_model d_k']
  key: Float[Array, 'd_model d_k']
  value: Float[Array, 'd_model d_y']
  residual: Float[Array, 'd_model d_y']


class Regularised(NamedTuple):
  """Settings of a regularised layer; all zero is the plain layer.

  Attributes:
    printed: alpha of the printed form, `(A - alpha I) V`.
    strict: alpha of the strict form, `(A - alpha diag(A)) V`.
    untied: strength of the untied residual path.
  """

  printed: float | Array = 0.0
  strict: float | Array = 0.0
  untied: float | Array = 0.0


def init_regularised(
  key: PRNGKeyArray, run: pretraining.Run
) -> tuple[RegularisedParams, Array]:
  """The layer of a run, with a matrix for the untied residual path."""
  query, keys, value = run.params
  labels = pretraining.LABEL_DIM
  params = RegularisedParams(
    query, keys, value[:, -labels:], draw_matrix(key, value.shape[0], labels)
  )
  return params, run.phi.projection


def predict_regularised(
  params: RegularisedParams,
  settings: Regularised,
  directions: Array,
  prompt: Prompt,
) -> Float[Array, ' d_y']:
  """The label that a regularised layer predicts."""
  query, keys, values = read(params, prompt.tokens)
  weights = query_weights(query, keys, directions, scale_of(query))
  own = settings.printed + settings.strict * weights[-1]
  path = settings.untied * (prompt.tokens[-1] @ params.residual)
  return values.T @ weights - own * values[-1] + path


class PlainParams(NamedTuple):
  """The layer, as far as it is trained.

  Attributes:
    query: shape `[d_model, d_k]`.
    key: shape `[d_model, d_k]`.
    value: label columns of the value projection. Shape `[d_model, d_y]`.
  """

  query: Float[Array, 'd_model d_k']
  key: Float[Array, 'd_model d_k']
  value: Float[Array, 'd_model d_y']


class Negative(NamedTuple):
  """Settings of a layer with negative samples; `strength=0` is plain.

  Attributes:
    num_negatives: `k`.
    strength: the total `beta` that they lose.
    by_score: 1 to choose the lowest scores, -1 the highest, 0 none of them.
    by_noise: 1 to choose at random.
    raise_others: 1 to give what they lose to all others in equal parts, 0 to
      let the weights sum to `1 - beta`.
    own: 1 if the query's own token may be chosen.
  """

  num_negatives: float | Array = 1.0
  strength: float | Array = 0.0
  by_score: float | Array = 1.0
  by_noise: float | Array = 0.0
  raise_others: float | Array = 1.0
  own: float | Array = 0.0


def init_plain(
  key: PRNGKeyArray, run: pretraining.Run
) -> tuple[PlainParams, Array]:
  """The layer of a run."""
  del key
  query, keys, value = run.params
  params = PlainParams(query, keys, value[:, -pretraining.LABEL_DIM :])
  return params, run.phi.projection


def predict_negative(
  params: PlainParams, settings: Negative, directions: Array, prompt: Prompt
) -> Float[Array, ' d_y']:
  """The label that a layer with negative samples predicts."""
  query, keys, values = read(params, prompt.tokens)
  weights = query_weights(query, keys, directions, scale_of(query))
  criterion = settings.by_score * weights + settings.by_noise * prompt.noise
  criterion = jax.lax.stop_gradient(criterion)
  barred = jnp.where(settings.own > 0, criterion[-1], jnp.inf)
  chosen = _ranks(criterion.at[-1].set(barred)) < settings.num_negatives
  size, count = weights.shape[0], settings.num_negatives
  share = settings.strength / count
  rest = settings.raise_others * settings.strength / (size - count)
  change = jnp.where(chosen, -share, rest).astype(weights.dtype)
  return values.T @ (weights + change)


def _ranks(criterion: Float[Array, ' n']) -> Array:
  """How many entries come before each one; ties by lower index."""
  index = jnp.arange(criterion.shape[0])
  mine, other = criterion[:, None], criterion[None]
  earlier = (other == mine) & (index[None] < index[:, None])
  before = (other < mine) | earlier
  return jnp.sum(before.astype(criterion.dtype), axis=1)
