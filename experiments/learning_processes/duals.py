"""For how long do dual models of other losses give attention's answer?"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.learning_processes import prompts
from experiments.learning_processes.prompts import angle
from iclcl_jax import attention, dual, features, losses, modified

EXACT = 1e-12
CLOSE = 10.0  # Degrees within which attention counts as a prediction.
OTHERS = 'squared', 'InfoNCE', 'cosine'
REN = 'Ren & Liu, arXiv:2310.13220'
FIRST_STEPS = {  # Sources and statements.
  'squared': f"""[{REN}, Theorem 3.1 (any loss of that first step)] the first
    step on the squared loss from W_0 = 0 is attention""",
  'InfoNCE': """[van den Oord et al., arXiv:1807.03748, eq. 4] the first step on
    InfoNCE from W_0 = 0 is attention with centred values""",
  'cosine': f"""[{REN}, section 4 (normalised similarity)] the first step on the
    cosine from the query token is attention with the labels of that loss's
    gradient""",
  'frozen_target': f"""[{prompts.COMPARISON}] BYOL's first step with the values
    as frozen target, inner products and no predictor is attention""",
  'frozen_kernel': f"""[{prompts.COMPARISON}] contrastive kernel learning's
    first step with values as frozen branches and no constraint is attention
    with negatives""",
}
IDENTITY = features.IdentityFeatures()  # The dual model's keys are features.


class Path(NamedTuple):
  """A dual model along its steps, beside attention. Shapes `[S, P, T]`."""

  weights_angle: Any  # Change of the weights and attention's step, degrees.
  answer_angle: Any  # Answer and attention output, degrees.
  first_angle: Any  # Change of the weights and that of the first step, degrees.
  first_answer_angle: Any  # Answer and that of the first step, degrees.
  growth: Any  # Change of the weights over that of the first step.


class Results(NamedTuple):
  first_steps: Mapping[str, Any]  # Errors of what should be attention.
  relative_step_size: Any  # Attention's step size over the largest stable one.
  paths: Mapping[str, Path]  # By loss.


class Task(NamedTuple):
  keys: Any  # Features of the demonstrations. Shape `[N, R]`.
  values: Any  # Their labels. Shape `[N, d_v]`.
  query: Any  # Features of the query. Shape `[R]`.
  zero: Any  # The state that has seen nothing.
  own: Any  # The state that has seen the query's token.


def measure(config: Config) -> dict[str, Results]:
  def of_prompt(prompt: prompts.Prompt) -> Results:
    keys, values = prompt.views.keys, prompt.values
    own = dual.zero_shot(IDENTITY, prompt.views.own_key[None], values[-1:])
    zero = dual.empty(IDENTITY, keys, values[:-1])
    task = Task(keys, values[:-1], prompt.views.query, zero, own)
    total = jnp.sum(keys @ task.query)
    size = 1 / jnp.maximum(total, 1)
    return Results(
      _first_steps(prompt, task, total),
      size * total,
      _paths(task, size, config.num_dual_steps),
    )

  return prompts.of_every(config, of_prompt)


def _paths(task: Task, size, num_steps) -> dict[str, Path]:
  """Dual models of four losses, along many steps.

  From `W_0 = 0`, the cosine from the query's token. First steps are as long as
  that of the contrastive loss at `min(1 / D, 1 / largest eigenvalue)`, which is
  stable for the squared loss.
  """
  data = task.keys, task.values
  step = _weights(dual.one_step(IDENTITY, task.zero, *data))
  length = size * jnp.linalg.norm(step)

  def path(loss, start):
    weights = descend(loss, start, *data, length, num_steps)
    moved = weights - start.weights[None]
    answers = moved @ task.query
    return Path(
      *(
        jax.vmap(lambda x, y=y: angle(x, y))(along)
        for along, y in (
          (moved, step),
          (answers, step @ task.query),
          (moved, moved[0]),
          (answers, answers[0]),
        )
      ),
      growth=jnp.linalg.norm(moved, axis=(1, 2)) / jnp.linalg.norm(moved[0]),
    )

  return {
    'contrastive': path(losses.contrastive, task.zero),
    'squared': path(losses.squared, task.zero),
    'InfoNCE': path(losses.info_nce(_temperature(task.values)), task.zero),
    'cosine': path(losses.cosine, task.own),
  }


def _temperature(values):
  """That of the values' own products."""
  return jnp.mean(jnp.sum(values**2, axis=1))


def _weights(state: Any):
  return state.weights


def descend(loss, start, keys, values, length, num_steps: int):
  """Weights `[T, d_v, R]` along descent; the first step has this length."""
  whole = dual.one_step_autodiff(IDENTITY, start, keys, values, loss=loss)
  rate = length / jnp.linalg.norm(_weights(whole) - start.weights)
  return dual.train(
    IDENTITY,
    start,
    keys,
    values,
    optimizer=optax.sgd(rate),
    num_epochs=num_steps,
    batch_size=keys.shape[0],
    loss=loss,
    observe=_weights,
  ).observations


def _first_steps(prompt: prompts.Prompt, task: Task, total) -> dict[str, Any]:
  """First steps that are attention: relative errors of their answers."""
  values = task.values
  random = task.own._replace(weights=prompt.start.weights)
  negative = values - jnp.roll(values, -1, axis=0)  # Less another's value.
  temperature = _temperature(values)

  def answer(loss, start, labels=values):
    new = dual.one_step_autodiff(IDENTITY, start, task.keys, labels, loss=loss)
    return (_weights(new) - start.weights) @ task.query

  nce = answer(losses.info_nce(temperature), task.zero)
  pairs = {
    'squared': (answer(losses.squared, task.zero), values),
    'InfoNCE': (temperature * nce, values - jnp.mean(values, axis=0)[None]),
    # BYOL's step with a frozen target, the identity as predictor, and inner
    # products; kernel learning's with frozen branches and no constraint.
    'frozen_target': (answer(losses.contrastive, random), values),
    'frozen_kernel': (answer(losses.contrastive, random, negative), negative),
  }
  attend = functools.partial(
    attention.kernel_attention, prompt.phi, prompt.query, prompt.keys[:-1]
  )
  scale = jnp.max(jnp.abs(values))
  errors = {
    name: jnp.max(jnp.abs(found / total - attend(labels))) / scale
    for name, (found, labels) in pairs.items()
  }
  found, expected = answer(losses.cosine, task.own), _cosine_step(prompt)
  error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
  return errors | {'cosine': error}


def _cosine_step(prompt: prompts.Prompt):
  """What the cosine's first step adds to the answer, by its attention."""
  phi, query, keys, values, *_ = prompt
  attend = modified.attention_from_loss(losses.cosine)
  output = attend(phi, query, keys, values, num_query_tokens=1)
  scores, log_scale = attention.scores(phi, query, keys)
  added = output * jnp.sum(scores) - scores[-1] * values[-1]
  return added * jnp.exp(log_scale)


def claims(config: Config, results: Mapping[str, Results]) -> lab.Claims:
  last = config.num_dual_steps
  for data, result in results.items():
    path, source = result.paths['contrastive'], prompts.COMPARISON
    largest = np.max([path.weights_angle, path.answer_angle])
    errors = {
      f'first_step_{name}': lab.at_most(EXACT, np.max(result.first_steps[name]))
      for name in FIRST_STEPS
    }
    text = '\n'.join(
      f'first_step_{name} {words} | largest relative error of the answer'
      for name, words in FIRST_STEPS.items()
    )
    yield from prompts.statements(data, text, errors)
    yield from prompts.statements(
      data,
      f"""schedule [{REN}v1, section 5] on the contrastive loss every later step
      repeats the first | largest angle of weights and attention, degrees""",
      {'schedule': lab.at_most(1e-5, largest)},
    )
    for name, step in itertools.product(OTHERS, sorted({min(10, last), last})):
      key = f'{name}_after_{step}_steps'
      angles = result.paths[name].first_answer_angle[..., step - 1]
      yield from prompts.statements(
        data,
        f"""{key} [{source}] after {step} steps on the {name} loss the answer
        still points where the attention of the first step points | angle in
        degrees""",
        {key: lab.at_most(CLOSE, angles)},
      )


def figures(config: Config, results: Mapping[str, Results]) -> list[lab.Figure]:
  figure, axes = drawing.subplots(
    2, len(results), figsize=(11, 7.6), sharex=True, sharey=True
  )
  for column, (data, result) in enumerate(results.items()):
    for index, name in enumerate(('contrastive', *OTHERS)):
      path = result.paths[name]
      prompts.draw_curve(axes[0, column], index, name, path.weights_angle)
      prompts.draw_curve(axes[1, column], index, name, path.answer_angle)
    axes[0, column].set_title(f'demonstrations: {data}')
    axes[1, column].set_xlabel('gradient steps')
  axes[0, 0].set_ylabel("weights and attention's,\nangle in degrees")
  axes[1, 0].set_ylabel('answer and attention output,\nangle in degrees')
  axes[0, 0].set_ylim(-3, 92)
  drawing.legend(axes[0, 0], 4, handlelength=3.2)
  caption = f"""Dual models that descend on four losses, full batch, in steps of
    fixed size; all first steps are equally long. Top: angle of the change of
    the weights and attention's step. Bottom: angle of the answer and the
    attention output. Both are zero at every step of the contrastive loss, at
    the first alone of the squared one. InfoNCE begins with centred values and
    the cosine with the query token: other attentions.
    {prompts.about(config, 'shaded')}"""
  return [lab.Figure('duals', figure, caption)]


def summary(config: Config, results: Mapping[str, Results]) -> dict[str, Any]:
  """How often attention's own step size is stable for the squared loss."""
  note = (
    'Share of prompts whose normaliser D is more than half the largest '
    "eigenvalue of the demonstrations' kernel matrix: a step of 1 / D is then "
    'stable for the squared loss.'
  )
  return {
    'step_sizes': {
      k: {'share_of_prompts': np.mean(x.relative_step_size > 0.5), 'note': note}
      for k, x in results.items()
    }
  }


def metrics(config: Config, results: Mapping[str, Results]) -> lab.Metrics:
  for data, result in results.items():
    for name, path in result.paths.items():
      yield from prompts.curve_rows(data, 'duals', name, path._asdict())
