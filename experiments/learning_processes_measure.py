"""Measurements of `experiments.learning_processes`: one prompt, then all.

`config` is that of the experiment.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import harness, pretraining
from experiments import learning_processes_dynamics as dynamics
from iclcl_jax import attention, features, losses, modified
from iclcl_jax.types import Array, Float


class Prompts(NamedTuple):
  """Prompts with leading axes `[S, P]`, features with `[S]`.

  Attributes:
    phi: feature map.
    query: the query. Shape `[d]`.
    keys: keys of demonstrations, then of the query's token. Shape `[n, d]`.
    values: their values. Shape `[n, d]`.
    start: where the self-supervised processes start.
  """

  phi: features.PositiveFeatures
  query: Float[Array, ' d']
  keys: Float[Array, 'n d']
  values: Float[Array, 'n d']
  start: dynamics.Encoder


def draw_start(config: Any, key: Array) -> dynamics.Encoder:
  """Draws weights and predictor of one prompt's processes."""
  width = pretraining.TOKEN_DIM
  rank = min(config.num_features, 2 * config.num_demonstrations + 2)
  return dynamics.init_encoder(key, width, rank, jnp.float32)


def measure(config: Any, prompts: Prompts) -> dict[str, Any]:
  """Measures everything for every prompt.

  Args:
    config: settings.
    prompts: prompts, NumPy arrays.

  Returns:
    Arrays with leading axes `[S, P]`, by name.
  """

  def for_all(fn):
    over_prompts = jax.vmap(fn, in_axes=(None, 0))
    return harness.compile_quickly(jax.vmap(over_prompts))

  see = for_all(lambda phi, rows: dynamics.views(phi, *rows))
  tokens = dynamics.compress(jax.device_get(see(prompts.phi, prompts[1:4])))
  problem = dynamics.kernel_problem(tokens, prompts.start.weights)

  def of_prompt(phi, prompt):
    rows, tokens, problem = prompt
    prompt = Prompts(phi, *rows)
    return {
      'duals': duals(config, prompt, tokens),
      'exact': exact(prompt, tokens),
      'ingredients': ingredients(prompt, tokens),
      'processes': processes(config, prompt, tokens, problem),
    }

  arguments = prompts[1:], tokens, problem
  return jax.device_get(for_all(of_prompt)(prompts.phi, arguments))


def info_nce(values: Float[Array, 'N d']) -> losses.Loss:
  """InfoNCE at the temperature of the values' own products."""
  temperature = jax.lax.stop_gradient(jnp.mean(jnp.sum(values**2, axis=1)))
  plain = losses.info_nce()
  # The temperature is traced; it enters as a scale of the predictions.
  return lambda predictions, values: plain(predictions / temperature, values)


def duals(
  config: Any, prompt: Prompts, tokens: dynamics.Views
) -> dict[str, Any]:
  """Dual models of four losses, along many steps.

  The first three start from `W_0 = 0`, the cosine from the query's token. All
  first steps are as long as that of the contrastive loss at its step size,
  `min(1 / D, 1 / largest eigenvalue)`: stable for the squared loss.
  """
  values, own = prompt.values[:-1], prompt.values[-1]
  step = values.T @ tokens.keys
  total = jnp.sum(tokens.keys @ tokens.query)
  size = 1 / jnp.maximum(total, 1)
  cases = {
    'contrastive': losses.contrastive,
    'squared': losses.squared,
    'InfoNCE': info_nce(values),
    'cosine': losses.cosine,
  }
  results: dict[str, Any] = {'relative_step_size': size * total}
  for name, loss in cases.items():
    start = jnp.zeros_like(step)
    if name == 'cosine':
      start = own[:, None] * tokens.own_key[None]
    weights = dynamics.descend(
      loss,
      tokens.keys,
      values,
      start,
      size * jnp.linalg.norm(step),
      config.num_dual_steps,
    )
    results[name] = _compare(weights, start, step, tokens)
  return results


def _compare(weights, start, step, tokens) -> dict[str, Any]:
  """Every step's weights and answers, beside those of attention."""
  moved = weights - start[None]
  answer = step @ tokens.query
  return {
    'weights_angle': jax.vmap(lambda w: dynamics.angle(w, step))(moved),
    'answer_angle': jax.vmap(
      lambda w: dynamics.angle(w @ tokens.query, answer)
    )(moved),
    'first_angle': jax.vmap(lambda w: dynamics.angle(w, moved[0]))(moved),
    'first_answer_angle': jax.vmap(
      lambda w: dynamics.angle(w @ tokens.query, moved[0] @ tokens.query)
    )(moved),
    'growth': jnp.linalg.norm(moved, axis=(1, 2)) / jnp.linalg.norm(moved[0]),
  }


def exact(prompt: Prompts, tokens: dynamics.Views) -> dict[str, Array]:
  """First steps that are attention: relative errors of their answers."""
  values, total = prompt.values[:-1], jnp.sum(tokens.keys @ tokens.query)
  attend = functools.partial(
    attention.kernel_attention, prompt.phi, prompt.query, prompt.keys[:-1]
  )
  other = jnp.roll(values, -1, axis=0)  # Another token's value.
  temperature = jnp.mean(jnp.sum(values**2, axis=1))

  def step(loss, start):
    slope = jax.grad(lambda w: loss(tokens.keys @ w.T))(start)
    return -slope @ tokens.query / total

  zero = jnp.zeros_like(prompt.start.weights)
  nce = info_nce(values)
  centred = values - jnp.mean(values, axis=0)[None]
  pairs = {
    'squared': (step(lambda f: losses.squared(f, values), zero), values),
    'InfoNCE': (temperature * step(lambda f: nce(f, values), zero), centred),
    # BYOL's step with a frozen target, the identity as predictor, and inner
    # products; kernel learning's with frozen branches and no constraint.
    'frozen_target': (
      step(lambda f: -jnp.sum(f * values), prompt.start.weights),
      values,
    ),
    'frozen_kernel': (
      step(lambda f: jnp.sum(f * (other - values)), prompt.start.weights),
      values - other,
    ),
  }
  scale = jnp.max(jnp.abs(values))
  errors = {
    name: jnp.max(jnp.abs(found - attend(labels))) / scale
    for name, (found, labels) in pairs.items()
  }
  return errors | {'cosine': _cosine_error(prompt, tokens)}


def _cosine_error(prompt: Prompts, tokens: dynamics.Views) -> Array:
  """The cosine's first step, by the library and by hand, relative."""
  phi, query, keys, values, _ = prompt
  attend = modified.attention_from_loss(losses.cosine)
  output = attend(phi, query, keys, values, num_query_tokens=1)
  scores, log_scale = attention.scores(phi, query, keys)
  expected = output - scores[-1] * values[-1] / jnp.sum(scores)
  expected = expected * jnp.sum(scores) * jnp.exp(log_scale)
  start = values[-1][:, None] * tokens.own_key[None]
  slope = jax.grad(lambda w: losses.cosine(tokens.keys @ w.T, values[:-1]))
  found = -slope(start) @ tokens.query
  return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


INGREDIENTS = (
  'none: inner product, values as targets',
  'cosine instead of inner product',
  'random predictor',
  'own outputs as targets',
  'all three: SimSiam',
)


def ingredients(prompt: Prompts, tokens: dynamics.Views) -> Array:
  """Angles of first steps with attention's, for each of SimSiam's ingredients.

  All from the same random weights, along the keys' view alone. Shape `[5]`, in
  the order of `INGREDIENTS`.
  """
  values, start = prompt.values[:-1], prompt.start
  simsiam = dynamics.PROCESSES['SimSiam']
  target = dynamics.normalise(tokens.values)

  def plain(encoder):
    return tokens.keys @ encoder.weights.T

  compared = (
    lambda e: losses.contrastive(plain(e), values),
    lambda e: losses.cosine(plain(e), values),
    lambda e: losses.contrastive(simsiam.online(e, tokens.keys), values),
    lambda e: losses.contrastive(plain(e), simsiam.target(e, target)),
    lambda e: losses.cosine(
      simsiam.online(e, tokens.keys), simsiam.target(e, target)
    ),
  )
  step = values.T @ tokens.keys
  slopes = [jax.grad(loss)(start).weights for loss in compared]
  return jnp.stack([dynamics.angle(-slope, step) for slope in slopes])


def processes(
  config: Any,
  prompt: Prompts,
  tokens: dynamics.Views,
  problem: dynamics.KernelProblem,
) -> dict[str, Any]:
  """Representations along the self-supervised processes."""
  values = prompt.values[:-1]
  step = values.T @ tokens.keys
  rows = dynamics.normalise(tokens.keys)
  second = dynamics.normalise(tokens.values)
  dual = tokens.keys @ step.T
  answer = step @ tokens.query

  def look(weights, targets):
    outputs = rows @ weights.T
    return {
      'output_spread': dynamics.spread(outputs),
      'target_spread': dynamics.spread(targets),
      'alignment': dynamics.alignment(outputs, dual),
      'answer_angle': dynamics.angle(weights @ tokens.query, answer),
    }

  results: dict[str, Any] = {
    'dual model': {
      'output_spread': dynamics.spread(dual),
      'target_spread': dynamics.spread(values),
    }
  }
  for name, process in dynamics.PROCESSES.items():
    results[name] = dynamics.train_encoder(
      process,
      prompt.start,
      tokens,
      learning_rate=config.learning_rate,
      momentum=config.momentum,
      num_steps=config.num_process_steps,
      observe=functools.partial(_look_at, look, process, rows, second),
    )
  arrays = dynamics.triplets(tokens)
  identity = jnp.eye(prompt.start.weights.shape[0])
  results['kernel learning'] = dynamics.train_kernel_encoder(
    problem.start,
    tokens,
    step_size=problem.step_size,
    num_steps=config.num_process_steps,
    observe=lambda w: (
      look(w, second @ w.T)
      | {
        'loss': dynamics.kernel_loss(w, *arrays) / problem.best,
        'constraint': jnp.max(jnp.abs(w @ w.T - identity)),
      }
    ),
  )
  return results


def _look_at(look, process, rows, second, encoder) -> dict[str, Array]:
  loss = dynamics.cosine_loss(process, encoder, rows, second)
  return look(encoder.weights, process.target(encoder, second)) | {'loss': loss}
