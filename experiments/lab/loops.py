"""Long loops in blocks, with progress and checkpoints; training by optax."""

import contextlib
import contextvars
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_FOLDER: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
  'checkpoints', default=None
)


@contextlib.contextmanager
def checkpoints_in(folder: pathlib.Path) -> Iterator[None]:
  """Lets the loops inside keep their checkpoints below a folder."""
  token = _FOLDER.set(folder)
  try:
    yield
  finally:
    _FOLDER.reset(token)


def scan_blocks(
  step_fn: Callable[..., tuple[Any, Any]],
  carry: Any,
  num_steps: int,
  *,
  block_size: int,
  name: str,
  description: str = '',
  shared: tuple[Any, ...] = (),
) -> tuple[Any, Any]:
  """`lax.scan` over step numbers, in blocks, with progress and checkpoints.

  A killed run resumes from its last block and ends in the same numbers, so a
  random step must derive its key from the step number
  (`jax.random.fold_in(root, step)`). Outside a run of `lab.run` there are no
  checkpoints.

  Args:
    step_fn: `(*shared, carry, step) -> (carry, outputs)`.
    carry: the initial carry, a pytree of arrays.
    num_steps: number of steps.
    block_size: steps between checkpoints.
    name: of this loop, unique in its experiment: the folder of its checkpoints.
    description: label of the progress bar; the name if empty.
    shared: pytrees that every step reads, such as a large model: arguments of
      the compiled loop, where a closure would make them its constants.

  Returns:
    Carry and outputs, stacked along a leading axis of `num_steps`.
  """
  import tqdm

  @jax.jit
  def block(shared, carry, steps):
    return jax.lax.scan(functools.partial(step_fn, *shared), carry, steps)

  with _manager(name) as manager:
    done = (manager and manager.latest_step()) or 0
    outputs: list[Any] = []
    if done:
      carry, earlier = _restore(
        manager, done, functools.partial(step_fn, *shared), carry
      )
      outputs.append(earlier)
    bar = tqdm.tqdm(  # None: no bar where nobody looks, such as in a log file.
      total=num_steps,
      initial=done,
      desc=description or name,
      unit='step',
      disable=None,
    )
    with bar:
      while done < num_steps:
        size = min(block_size, num_steps - done)
        carry, new = block(shared, carry, jnp.arange(done, done + size))
        outputs.append(jax.device_get(new))
        done += size
        bar.update(size)
        outputs = [jax.tree.map(lambda *x: np.concatenate(x), *outputs)]
        if manager:
          import orbax.checkpoint as ocp

          tree = {'carry': carry, 'outputs': outputs[0]}
          tree |= {'checksum': _checksum(tree)}
          manager.save(done, args=ocp.args.StandardSave(tree))
  return carry, outputs[0]


@contextlib.contextmanager
def _manager(name: str) -> Iterator[Any]:
  """The checkpoints of one loop, or None outside a run."""
  folder = _FOLDER.get()
  if folder is None:
    yield None
    return
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    max_to_keep=1, enable_async_checkpointing=False
  )
  path = (folder / name).resolve()
  with ocp.CheckpointManager(path, options=options) as manager:
    yield manager


def _restore(manager, done: int, step_fn, carry) -> tuple[Any, Any]:
  import orbax.checkpoint as ocp

  _, outputs = jax.eval_shape(
    lambda c: jax.lax.scan(step_fn, c, jnp.arange(done)), carry
  )
  tree = {
    'carry': jax.eval_shape(lambda: carry),
    'outputs': jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), outputs),
    'checksum': np.zeros((), np.uint32),
  }
  try:
    restored = manager.restore(done, args=ocp.args.StandardRestore(tree))
    if restored.pop('checksum') != _checksum(restored):
      raise ValueError('its checksum differs')
  except Exception as error:  # Orbax raises many kinds for a damaged folder.
    raise ValueError(
      f'checkpoint {done} of {str(manager.directory)!r} cannot be read '
      f'({type(error).__name__}); delete that folder to start afresh.'
    ) from error
  return restored['carry'], restored['outputs']


def _checksum(tree: Any) -> np.ndarray:
  """CRC-32 of all arrays: storage returns damaged bytes without a word."""
  value = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
  return np.asarray(value, np.uint32)


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

  A pure function: `jax.vmap` or `jax.lax.map` trains several runs. A batch of
  `loss_fn(params, batch)` is what `draw_fn` makes, beside the next state, of a
  source. Returns the weights by record, the first before training, the last
  after it; `num_steps` is a multiple of `record_every`.
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
  _, kept = jax.lax.scan(block, carry, length=num_steps // record_every)
  return jax.tree.map(lambda w, r: jnp.concatenate([w[None], r]), params, kept)
