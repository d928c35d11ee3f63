"""A language model whose heads are finite dual models.

Each head keeps the first tokens and the last ones exactly, and all others in
the weights `W` of a dual model: what is kept does not grow with the text. How
far that changes the predictions is measured by `experiments.finite_duals`.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import (
  _pytree,
  _validate,
  finite_duals,
  kernels,
  storage,
  transformer,
)
from iclcl_jax._door import door
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer._forward import normalise
from iclcl_jax.types import Array, FeatureMap, Float, Int

_KINDS = {
  kind.__name__: kind
  for kind in (finite_duals.LandmarkFeatures, finite_duals.ExponentialFeatures)
}


@_pytree.dataclass(kw_only=True)
class FiniteModel:
  """A language model, and what its heads read in place of the softmax.

  The `maps` of all key-value heads have arrays with leading axes `[L, G]`; the
  `learner` says which tokens are kept exactly.
  """

  model: LanguageModel
  maps: FeatureMap
  learner: finite_duals.WindowedLearner


@_pytree.with_short_repr
class FiniteState(NamedTuple):
  """All that is kept of a text: the state of each head, `[L, G]`."""

  heads: finite_duals.WindowState
  used: Int[Array, '']  # How many tokens were read.


@door
def fit(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  num_landmarks: int = 64,
  learner: finite_duals.WindowedLearner | None = None,
) -> FiniteModel:
  """Fits landmark maps to all heads, by a calibration text.

  Layer after layer: each is fitted to what the finite layers before it make of
  the text. The text should be of the kind, and about as long as, those that the
  model will read.

  Args:
    tokens: the text, at least as many as landmarks. Shape `[N]`.
    num_landmarks: features of each key-value head.
    learner: which tokens are kept exactly; None for the first and 16 last.

  Raises `ValueError` if the model is an encoder, or has what the landmarks of a
  softmax kernel do not imitate: capped scores, sinks without tokens, windows,
  rotations that depend on the length of the text.
  """
  _check(model, tokens)
  learner = finite_duals.WindowedLearner() if learner is None else learner
  expected: Any = finite_duals.WindowedLearner
  _validate.check_type('learner', learner, expected, 'a WindowedLearner')
  kind = kernels.ExponentialKernel
  _validate.check_type('learner.kernel', learner.kernel, kind, kind.__name__)
  positions = jnp.arange(tokens.shape[0])
  far = learner.is_far(positions[:, None], positions[None])

  def fit_head(queries, keys):
    rows = queries.reshape(-1, queries.shape[-1])
    pairs = jnp.tile(far, (queries.shape[0], 1))
    return finite_duals.fit_landmarks(
      rows, keys, num_landmarks=num_landmarks, far=pairs
    )

  def layer(stream, block):
    heads = _heads(model, block, stream, positions)
    maps = jax.vmap(fit_head)(heads.queries, heads.keys)
    stream, _ = _layer(model, learner, maps, None, stream, block, positions)
    return stream, maps

  stream = _model.embed(model, tokens)
  _, maps = transformer.scan_blocks(
    model.architecture, model.blocks, layer, stream
  )
  return FiniteModel(model=model, maps=maps, learner=learner)


@door
def logits(
  finite: FiniteModel, tokens: Int[Array, ' N']
) -> Float[Array, 'N vocab']:
  """Scores the token after each token of a text, as `pretrained.logits` does.

  Raises `ValueError` as `fit` does.
  """
  stream, _ = _read(finite, None, tokens)
  return _model.unembed(finite.model, stream)


@door
def prefill(
  finite: FiniteModel, tokens: Int[Array, ' N']
) -> tuple[Float[Array, ' vocab'], FiniteState]:
  """Reads a text; returns the logits after it, and all that is kept of it.

  Raises `ValueError` as `fit` does.
  """
  stream, state = _read(finite, None, tokens)
  return _model.unembed(finite.model, stream[-1:])[0], state


@door
def decode_step(
  finite: FiniteModel, state: FiniteState, token: Int[Array, '']
) -> tuple[Float[Array, ' vocab'], FiniteState]:
  """Reads one more token, in time and memory that do not grow with the text."""
  _check_finite(finite)
  _model.check_ids(finite.model, 'token', token)
  context, why = finite.model.context_length, 'It is the context of the model.'
  _validate.check_room('state', context, why, state.used, 1)
  stream, state = _read(finite, state, jnp.asarray(token)[None])
  return _model.unembed(finite.model, stream)[0], state


@door
def generate(
  finite: FiniteModel, tokens: Int[Array, ' N'], *, num_tokens: int
) -> Int[Array, ' T']:
  """Continues a text by the likeliest token each time: the new ids `[T]`.

  Raises `ValueError` as `fit` does, and if the text does not fit into the
  context.
  """
  _validate.at_least(1, num_tokens=num_tokens)
  start = prefill(finite, tokens)
  _model.check_length(finite.model, tokens.shape[0] + num_tokens)

  def step(carry, _):
    scores, state = carry
    token = jnp.argmax(scores).astype(tokens.dtype)
    return decode_step(finite, state, token), token

  _, generated = jax.lax.scan(step, start, length=num_tokens)
  return generated


def save(path: str | os.PathLike[str], finite: FiniteModel) -> None:
  """Saves the maps and the learner to a file, as `storage.save` does a state.

  The language model is not saved: it is where it was loaded from.
  """
  _validate.check_type('finite', finite, FiniteModel, 'a FiniteModel')
  kind = type(finite.maps).__name__
  if kind not in _KINDS:
    raise ValueError(
      f'finite.maps is a {kind}; expected one of {", ".join(_KINDS)}.'
    )
  learner = finite.learner
  sizes = np.array([learner.num_sinks, learner.window], np.int32)
  storage.write(path, kind, vars(finite.maps) | {'learner': sizes})


def load(path: str | os.PathLike[str], model: LanguageModel) -> FiniteModel:
  """Loads what `save` wrote, for the model that it was fitted to.

  Raises what `storage.load` does; `ValueError` for a model of another shape.
  """
  names = {k: [f.name for f in dataclasses.fields(_KINDS[k])] for k in _KINDS}
  kind, arrays = storage.read(
    path, {k: [*fields, 'learner'] for k, fields in names.items()}
  )
  num_sinks, window = arrays.pop('learner').tolist()
  finite = FiniteModel(
    model=model,
    maps=_KINDS[kind](**jax.tree.map(jnp.asarray, arrays)),
    learner=finite_duals.WindowedLearner(num_sinks=num_sinks, window=window),
  )
  _check_finite(finite)
  return finite


def _read(
  finite: FiniteModel, state: FiniteState | None, tokens: Int[Array, ' N']
) -> tuple[Float[Array, 'N d_model'], FiniteState]:
  _check_finite(finite)
  model = finite.model
  _check(model, tokens)
  used = jnp.asarray(0) if state is None else state.used
  positions = used + jnp.arange(tokens.shape[0], dtype=used.dtype)

  def layer(stream, block, maps, heads=None):
    return _layer(model, finite.learner, maps, heads, stream, block, positions)

  rows = (finite.maps,) if state is None else (finite.maps, state.heads)
  stream = _model.embed_at(model, tokens, positions)
  stream, heads = transformer.scan_blocks(
    model.architecture, model.blocks, layer, stream, *rows
  )
  stream = normalise(model.architecture, model.final_norm, stream)
  return stream, FiniteState(heads, used + tokens.shape[0])


def _layer(model, learner, maps, states, stream, block, positions):
  heads = _heads(model, block, stream, positions)
  if states is None:
    states = jax.vmap(learner.start)(maps, heads.keys, heads.values)

  def extend(phi, state, queries, keys, values):
    def head(queries):
      return learner.extend(phi, state, queries, keys, values)

    return jax.vmap(head, out_axes=(None, 0))(queries)

  states, outputs = jax.vmap(extend)(
    maps, states, heads.queries, heads.keys, heads.values
  )
  outputs = outputs.reshape(-1, *outputs.shape[2:])
  out = transformer.complete(model.architecture, block, stream, outputs)
  return out, states


def _heads(model, block, stream, positions) -> transformer.Heads:
  """Returns the heads, with queries by key-value head, `[G, H / G, N, d_k]`."""
  heads = transformer.heads(
    model.architecture, block, stream, positions=positions
  )
  num_groups, size, width = heads.keys.shape
  queries = heads.queries.reshape(num_groups, -1, size, width)
  return heads._replace(queries=queries)


def _check_finite(finite: Any) -> None:
  _validate.check_type('finite', finite, FiniteModel, 'what finite.fit returns')
  _model.check_model(finite.model)
  axes = finite.model.blocks.key.weight.shape
  for leaf in jax.tree.leaves(finite.maps):
    shape = list(leaf.shape)
    fits = len(shape) < 4 or shape[3] == axes[3]
    if shape[:2] != [axes[0], axes[2]] or not fits:
      raise ValueError(
        f'finite.maps has an array {shape}, and the model {axes[0]} layers of '
        f'{axes[2]} key-value heads of width {axes[3]}; expected maps that '
        'were fitted to this model.'
      )


def _check(model: LanguageModel, tokens: Array) -> None:
  _model.check_causal_prompt(model, tokens, None)
  architecture = model.architecture
  found = {
    'capped scores': architecture.score_cap is not None,
    'sinks without tokens': model.blocks.sinks is not None,
    'windows': any(x.window is not None for x in architecture.layers),
    'rotations that depend on the length': any(
      x.rotation is not None and x.rotation.beyond for x in architecture.layers
    ),
  }
  for name, has in found.items():
    if has:
      raise ValueError(
        f'model has {name}, which features of the softmax kernel do not '
        'imitate; expected plain softmax attention. Certify its heads with '
        'equivalence.verify_model, which knows them.'
      )
