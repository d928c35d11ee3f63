"""What tuned inner learners and trained layers do on fresh prompts.

`config` is that of `experiments.accounts`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import accounts_training as training
from experiments import harness
from experiments.accounts_memories import MEMORIES, Memory
from iclcl_jax.accounts import linear_regression_gd as account


def measure(config: Any, name: str, prompts: Mapping[str, Any]) -> Any:
  """Fits one memory, and measures it: one program.

  Args:
    config: settings.
    name: of the memory.
    prompts: what `accounts_training.draw_all` returns.

  Returns:
    NumPy arrays with leading axes `[K, S]`, tuned and, of layers, trained:
    `gates`, `loss` by length `[L]`, `scaled` by input scale `[A]`. Of layers
    also, with a leading axis `[S]`, the trained against the tuned one or its
    mirror image, whichever predicts more alike: the `ratio` of their losses,
    `cosine`, `difference` relative to the mean prediction, and whether it is
    `mirrored`.
  """
  memory = MEMORIES[name]

  @harness.compile_quickly
  def everything(prompts):
    layers = training.fit(memory, prompts['training'], prompts['keys'], config)
    by_seed = jax.tree.map(lambda w: jnp.swapaxes(w, 0, 1), layers)
    measured = jax.lax.map(
      lambda a: _evaluate(config, memory, *a),
      (by_seed, prompts['testing'], prompts['scaled']),
    )
    return measured | {'gates': by_seed.gates}

  # Every learner starts from the same random projections.
  keys = jax.random.clone(prompts['keys'])
  result = jax.device_get(everything({**prompts, 'keys': keys}))
  result['gates'] = np.stack(
    [
      gate.transform(jnp.asarray(result['gates'][..., index]))
      for index, gate in enumerate(memory.gates)
    ],
    axis=-1,
  )
  return {
    key: np.swapaxes(array, 0, 1) if key in _OF_BOTH else array
    for key, array in result.items()
  }


_OF_BOTH = 'gates', 'loss', 'scaled'


def _evaluate(config, memory: Memory, layers, testing, scaled):
  """Measures the tuned and the trained layer of one seed."""
  lengths = jnp.asarray(config.lengths)
  here = jnp.asarray([config.num_demonstrations])

  def loss(layer, prompts, lengths):
    guess = jax.vmap(lambda t: training.answers(memory, layer, t, lengths))(
      prompts.tokens
    )
    zero = jnp.mean(prompts.target**2)
    return jnp.mean((guess - prompts.target) ** 2, axis=0) / zero

  def one(layer):
    at_scale = jax.lax.map(lambda p: loss(layer, p, here)[0], scaled)
    return loss(layer, testing, lengths), at_scale

  curve, at_scale = jax.lax.map(one, layers)
  result = {'loss': curve, 'scaled': at_scale}
  if memory.is_layer:
    # Prompts of the length of training, scale 1.
    here = jax.tree.map(lambda x: x[config.scales.index(1.0)], scaled)
    result |= _alike(config, memory, layers, here)
  return result


def _alike(config, memory: Memory, layers, prompts):
  """Compares the trained layer with the tuned one and its mirror image."""
  here = jnp.asarray([config.num_demonstrations])

  def behaviour(layer, tokens):
    def answer(rows):
      return training.answers(memory, layer, rows, here)

    slope = account.sensitivity(answer, tokens, d_x=config.d_x)[0]
    return answer(tokens), slope

  tuned = jax.tree.map(lambda w: w[0], layers)
  trained = jax.tree.map(lambda w: w[1], layers)
  three = jax.tree.map(
    lambda *w: jnp.stack(w), tuned, training.mirrored(tuned), trained
  )
  guess, slopes = jax.lax.map(
    lambda layer: jax.vmap(lambda t: behaviour(layer, t))(prompts.tokens),
    three,
  )
  gaps = jnp.stack(
    [account.predictions_difference(guess[2], guess[i]) for i in range(2)]
  )
  # A layer that is its own mirror image is not mirrored, whatever rounding.
  nearer = (gaps[1] < 0.99 * gaps[0]).astype(int)
  losses = jnp.mean((guess - prompts.target[None]) ** 2, axis=(1, 2))
  return {
    'mirrored': nearer,
    'ratio': losses[2] / losses[nearer],
    'difference': gaps[nearer] / jnp.mean(jnp.abs(guess[nearer])),
    'cosine': account.model_cosine(slopes[2], slopes[nearer]),
  }
