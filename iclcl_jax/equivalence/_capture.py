"""Sees what a model hands to its attention, and what it gets back."""

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, attention, modified
from iclcl_jax.attention import _layout

_thread = threading.local()
_DOORS = attention.stream_kernel_attention, attention.causal_kernel_attention


@contextlib.contextmanager
def capture(*models: Any) -> Iterator[list[dict[str, Any]]]:
  """Records every attention that a model computes, and edits no model.

  Seen are `dot_product_attention` of `jax.nn` (plain JAX, and `flax.nnx` by
  default) and :mod:`iclcl_jax.attention`, the `attention_fn` of Linen modules
  and of what is passed here, `equinox.nn.MultiheadAttention`, and any function
  wrapped by `record`. `jax.jit` is off inside, except in attention.

  Takes objects that hold an `attention_fn` at any depth, NNX models say. Yields
  a list that receives the arguments of `verify_heads`, a dict for each
  attention in order of execution; none is a `ValueError` behind the block.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8), 'f4')
    >>> with capture() as calls:
    ...   h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> [equivalence.verify_heads(**call).verdict for call in calls]
    ['holds']
  """
  for model in models:
    is_held = isinstance(model, dict | list | tuple)
    if isinstance(model, type) or not (is_held or hasattr(model, '__dict__')):
      raise ValueError(
        f'capture was given {model!r:.200}; expected objects that hold an '
        'attention_fn. Pass an instance, such as an NNX model.'
      )
  calls: list[dict[str, Any]] = []
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.disable_jit())
    for module in jax.nn, attention, sys.modules.get('equinox.nn._attention'):
      if module is not None:
        stack.enter_context(_recording(calls, module, 'dot_product_attention'))
    for holder in _holders(models, set()):
      stack.enter_context(_recording(calls, holder, 'attention_fn'))
    if 'flax.linen' in sys.modules:

      def intercept(call, args, kwargs, context):
        with _recording(calls, context.module, 'attention_fn'):
          return call(*args, **kwargs)

      linen = sys.modules['flax.linen']
      stack.enter_context(linen.intercept_methods(intercept))
    yield calls
    jax.effects_barrier()
  if not calls:
    raise ValueError(
      'capture saw no attention; expected one inside the block. Pass the model '
      'if it holds an attention_fn, or wrap its attention function by '
      'equivalence.record.'
    )


def record(
  attention_fn: Callable[..., Any], calls: list[dict[str, Any]]
) -> Callable[..., Any]:
  """Wraps an attention function so that it notes arguments and outputs.

  The function `(query, key, value, ...) -> output` has the layout and argument
  names of `jax.nn.dot_product_attention`, or those of one head, `[T, d]`; a
  mask of numbers is True where it is not 0. The wrapper works under `jit`,
  `vmap`, `scan` and `grad`, and may stand where a module takes an
  `attention_fn`. For each call `calls` receives the arguments of
  `verify_heads`.
  """
  if hasattr(attention_fn, 'is_layout_door'):

    @functools.wraps(attention_fn)
    def watched(*args, **kwargs):
      with _recording(calls, attention, 'dot_product_attention'):
        return attention_fn(*args, **kwargs)

    return watched
  parameters = inspect.signature(attention_fn).parameters
  names, stated = list(parameters), _stated(attention_fn)
  defaults = {
    name: parameter.default  # A partial function's keywords are such, too.
    for name, parameter in parameters.items()
    if parameter.default is not parameter.empty
  }

  @functools.wraps(attention_fn)
  def recorded(*args, **kwargs):
    is_inside = getattr(_thread, 'is_inside', False)
    _thread.is_inside = True
    try:
      with jax.disable_jit(False):  # Nothing inside is to be seen.
        result = attention_fn(*args, **kwargs)
    finally:
      _thread.is_inside = is_inside
    if is_inside:
      return result
    named = defaults | stated | dict(zip(names, args, strict=False)) | kwargs
    tokens = [*args[:3], *(named[name] for name in names[len(args) : 3])]
    output, *rest = result if isinstance(result, tuple) else (result,)
    output = _note(calls, *tokens, output, named)
    return (output, *rest) if rest else output

  return recorded


def _note(calls, query, key, value, output, named) -> jax.Array:
  rank = query.ndim
  bias = named.get('bias')
  settings = {'is_causal': bool(named.get('is_causal', False))}
  scale, attend = named.get('scale'), named.get('attend')
  if attend is None:
    learner = {'scale': scale}
  else:
    learner = _learner(attend)
    query, key = _layout.stretched(query, key, scale)
  leaves, structure = jax.tree.flatten(learner)
  traced = {i: x for i, x in enumerate(leaves) if not _validate.is_concrete(x)}
  arrays = {
    'query': query,
    'key': key,
    'value': value,
    'output': output,
    'mask': _mask(query, key, named),
    'bias': None if bias is None else _with_rank(jnp.asarray(bias), rank),
    'learner': traced,
  }

  def store(arrays):
    arrays = jax.tree.map(np.asarray, arrays)
    batch = arrays['query'].shape[:-rank]
    first = (0,) * len(batch)  # One learner for all of a batch.
    known = {i: x[first] for i, x in arrays.pop('learner').items()}
    filled = [known.get(i, x) for i, x in enumerate(leaves)]
    learner = jax.tree.unflatten(structure, filled)
    if rank == 2:  # One head: the last axis of vmap, if any, has the others.
      for name in ('query', 'key', 'value', 'output'):
        x = arrays[name] if batch else arrays[name][None]
        arrays[name] = np.swapaxes(x, -3, -2)
    calls.append(arrays | settings | learner)
    return np.ones(batch, bool)

  if _validate.is_concrete(arrays):
    store(arrays)
    return output
  flag = jax.ShapeDtypeStruct((), jnp.bool_)
  arrays = jax.lax.stop_gradient(arrays)
  stored = jax.pure_callback(store, flag, arrays, vmap_method='broadcast_all')
  return jnp.where(stored, output, jnp.nan)


def _stated(attention_fn) -> dict[str, Any]:
  """Returns what a door of the library, with its map, says of itself."""
  bound = inspect.unwrap(attention_fn)  # A layer may hand on what records.
  door: Any = getattr(bound, 'func', None)
  owner = getattr(door, '__self__', None)
  if door not in _DOORS and not isinstance(owner, modified.Attention):
    return {}
  (phi,) = bound.args
  attend = phi if owner is None else functools.partial(owner, phi)
  return {'attend': attend, 'is_causal': 'causal' in door.__name__}


def _learner(attend) -> dict[str, Any]:
  """Returns what an attention of the library learns: map, loss, and rate."""
  if not isinstance(attend, functools.partial):
    return {'phi': attend}
  settings, fn = {'phi': attend.args[0]}, attend.func
  if isinstance(fn, modified.LossAttention):
    return settings | {'loss': fn.loss, 'learning_rate': fn.step_size}
  if isinstance(fn, modified.Attention):
    raise ValueError(
      f'the attention is {type(fn).__name__}, which verify_heads cannot state; '
      'expected a map, a kernel or attention_from_loss. Certify its queries by '
      'equivalence.verify(phi, q, k, v, attention_fn=..., penalty=..., '
      'num_query_tokens=...).'
    )
  return settings


def _mask(query, key, named) -> jax.Array | None:
  axis = -3 if query.ndim > 2 else -2
  size, num_keys = query.shape[axis], key.shape[axis]
  masks = []
  if named.get('mask') is not None:
    masks.append(jnp.asarray(named['mask']).astype(bool))
  for name, total, axes in (
    ('query_seq_lengths', size, (1, 3)),
    ('key_value_seq_lengths', num_keys, (1, 2)),
  ):
    valid = _layout.within(name, named.get(name), query.shape[:-3], total)
    if valid is not None:
      masks.append(jnp.expand_dims(valid, axes))
  window = named.get('local_window_size')
  if window is not None:
    window = np.broadcast_to(window, 2).tolist()
    masks.append(_layout.visible(None, size, num_keys, False, window))
  masks = [_with_rank(mask, query.ndim) for mask in masks]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _with_rank(x: jax.Array, rank: int) -> jax.Array:
  return x.reshape((1,) * (rank - x.ndim) + x.shape[max(0, x.ndim - rank) :])


@contextlib.contextmanager
def _recording(calls, owner: Any, name: str) -> Iterator[None]:
  held = vars(owner)  # Modules of the frameworks refuse setattr.
  function = held.get(name)
  if callable(function):
    held[name] = record(function, calls)
  try:
    yield
  finally:
    if callable(function):
      held[name] = function


def _holders(node: Any, seen: set[int]) -> Iterator[Any]:
  if id(node) in seen or isinstance(node, type | types.ModuleType):
    return
  seen.add(id(node))
  held = getattr(node, '__dict__', node)
  if held is not node and callable(held.get('attention_fn')):
    yield node
  if isinstance(held, dict | list | tuple):
    for child in list(held.values() if isinstance(held, dict) else held):
      yield from _holders(child, seen)
