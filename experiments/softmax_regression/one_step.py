"""How far does one gradient step go, and is it a step on the document?

Also the tasks of this step and of trained layers, in two frames.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, statistics
from iclcl_jax.accounts import softmax_regression as account

FRAMES = 'in place', 'held out'
SHARPNESS = 2.0  # Of the targets of the frame 'held out'.
CLOSE_COSINE = 0.9
LI = 'Li et al., arXiv:2304.13276'
statements = functools.partial(
  lab.statements, 'softmax-regression-', runs='repetitions'
)
Size = tuple[int, int]  # Words of a document, and their width.
NUM_RATES = 60


class Tasks(NamedTuple):
  """Softmax regressions, and the words on which they are judged."""

  posed: account.Problem
  queries: Any
  answer: Any


def draw(key: Any, size: Size, frame: Any) -> Tasks:
  """Draws one task of `n` words of width `d`; consumes the key.

  Frame 0: a target that has nothing to do with its document, judged in place;
  1: that of a hidden vector, judged on a new document with the same one.
  """
  keys = jax.random.split(key, 4)
  document = jax.random.normal(keys[0], size) / size[1] ** 0.5
  other = jax.random.normal(keys[1], size) / size[1] ** 0.5
  hidden = SHARPNESS * jax.random.normal(keys[2], size[1:])
  waits = jax.random.exponential(keys[3], size[:1])
  free = waits / jnp.sum(waits)  # Uniform on the simplex.
  made, answer = (jax.nn.softmax(x @ hidden) for x in (document, other))
  target = jnp.where(frame == 0, free, made)
  return Tasks(
    account.Problem(document, target),
    jnp.where(frame == 0, document, other),
    jnp.where(frame == 0, free, answer),
  )


def unit_rate(size: Size) -> float:
  """The step that is best where the prediction is nearly uniform."""
  return size[0] ** 2 * size[1] / sum(size)


def cosine(a: Any, b: Any) -> Any:
  """Cosine of two vectors of logits, whose means say nothing."""
  a, b = a - jnp.mean(a), b - jnp.mean(b)
  return (a @ b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def seed_keys(config: Config, size: Size, stream: int) -> Any:
  """One key for each repetition; both frames see the same documents."""
  root = jax.random.fold_in(jax.random.key(config.seed), size[0] + stream)
  return jax.random.split(jax.random.fold_in(root, size[1]), config.num_seeds)


class Step(NamedTuple):
  """One step with the best common rate. Shapes `[frames, seeds]`."""

  cosine: Any  # Of the moves of logits by a step on weights and on document.
  ratio_weights: Any  # Loss after the step over that at the start.
  rate_weights: Any  # Its rate, relative to `unit_rate`.
  ratio_without_self: Any  # Without what each word keeps of its own target.
  ratio_data: Any  # The same for a step on the document; only in place.


Results = Mapping[Size, Step]


def sizes(config: Config) -> list[Size]:
  few, most = config.num_words[0], config.num_words[-1]
  found = [(n, config.middle) for n in config.num_words]
  found += [(most, d) for d in config.widths] + [(few, config.widths[0])]
  return sorted(set(found))


@lab.once
def measure(config: Config) -> Results:
  return {
    size: lab.compute(functools.partial(one_step, config, size))
    for size in sizes(config)
  }


def one_step(config: Config, size: Size) -> Step:
  """One gradient step with the best common rate, judged on fresh tasks."""
  factors = jnp.logspace(-2, 2, NUM_RATES)

  def one_task(key, frame):
    key, key_start = jax.random.split(key)
    task = draw(key, size, frame)
    unit = unit_rate(size)
    step = account.attend(task.posed, task.queries, learning_rate=unit)
    centred = task.posed.target - 1 / size[0]
    own = jnp.sum(task.posed.document**2, axis=1) * centred * unit / size[0]
    weights, data = _shifts(task.posed, key_start)
    logits = {
      'weights': step,
      'without_self': step - own,
      'data': size[0] ** 2 * data,  # A data step cannot answer new queries.
    }

    def losses(z):
      def loss(factor):
        error = jax.nn.softmax(factor * z) - task.answer
        return jnp.sum(error**2) / 2

      return jax.vmap(loss)(jnp.append(factors, 0))

    return jax.tree.map(losses, logits), cosine(weights, data)

  def one_seed(key, frame):
    keys = jax.random.split(key, 2 * config.num_tasks)
    losses, cosines = jax.vmap(one_task, in_axes=(0, None))(keys, frame)
    found = {}
    for name, loss in losses.items():
      search, test = jnp.split(loss, 2)
      best = jnp.argmin(jnp.mean(search[:, :-1], axis=0))
      ends = jnp.mean(test, axis=0)
      found[f'ratio_{name}'] = ends[best] / ends[-1]
      found[f'rate_{name}'] = factors[best]
    return Step(jnp.mean(cosines), *(found[name] for name in Step._fields[1:]))

  def one_frame(frame):
    return jax.lax.map(lambda key: one_seed(key, frame), keys)

  keys = seed_keys(config, size, 0)
  # What does not depend on the frame, such as documents, is drawn once.
  return jax.vmap(one_frame)(jnp.arange(len(FRAMES)))


def _shifts(posed: account.Problem, key: Any) -> tuple[Any, Any]:
  """Moves of the logits by a step on weights and on document, near x = 0."""
  x = 0.01 * jax.random.normal(key, (posed.document.shape[1],))
  logits = posed.document @ x
  new = account.weight_shift(posed, x, learning_rate=1.0)
  # Of rate 1 / |x|^2, so that it does not vanish with x.
  rate = 1 / (x @ x)
  rewritten = posed.document - rate * account.gradients(posed, x).document
  return posed.document @ new - logits, rewritten @ x - logits


def claims(config: Config, results: Results) -> list[lab.Claim]:
  size = config.num_words[-1], config.middle
  found, where = results[size], f'n = {size[0]}, d = {size[1]}'
  gains = [
    float((1 - x.ratio_weights[0]).mean() * (n + d) / d)
    for (n, d), x in results.items()
  ]
  mean = lab.Estimate(float(np.mean(gains)), min(gains), max(gains))
  return statements(
    f"""
    shifts-agree [{LI}, title ("closeness")] a step on the weights and one on
      the document move the logits alike | cosine of the two moves, in place;
      {where}
    closed-form [derived here] in place, the best step removes the share
      d / (n + d) of the loss | measured share over d / (n + d), mean and range
      over all sizes (the closed form is linearised)
    memory [control] in place, a gradient step gains nothing but what each word
      keeps of its own target | loss ratio of the best step without a word's own
      target; {where}
    generalises [control] held out, a gradient step answers words that it has
      not seen | loss ratio of the best step; {where}
    """,
    {
      'shifts-agree': lab.at_least(CLOSE_COSINE, found.cosine[0]),
      'closed-form': lab.within(0.95, 1.25, mean),
      'memory': lab.at_least(0.998, found.ratio_without_self[0]),
      'generalises': lab.at_most(0.95, found.ratio_weights[1]),
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'one_gradient_step': [
      {
        'num_words': n,
        'width': d,
        'frame': name,
        'rate_over_closed_form': found.rate_weights[frame].mean(),
        'closed_form_ratio': None if frame else n / (n + d),
        'ratio_weights': statistics.mean(found.ratio_weights[frame]),
        'ratio_without_self': statistics.mean(found.ratio_without_self[frame]),
        'cosine': statistics.mean(found.cosine[frame]),
        'ratio_data': None if frame else statistics.mean(found.ratio_data[0]),
      }
      for (n, d), found in results.items()
      for frame, name in enumerate(FRAMES)
    ]
  }
