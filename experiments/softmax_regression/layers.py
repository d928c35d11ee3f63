"""Do self-attention layers, trained on such tasks, take that step?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import Config, figures as drawing, loops, statistics
from experiments.softmax_regression import one_step
from experiments.softmax_regression.one_step import (
  CLOSE_COSINE,
  FRAMES,
  LI,
  Size,
  Tasks,
  cosine,
  draw,
  seed_keys,
  statements,
  unit_rate,
)
from iclcl_jax.accounts import softmax_regression as account

CLOSE_LOSS = 0.05
PUBLISHED = 'softmax, two heads'
PANELS = {
  'loss_ratio': 'loss / loss at start',
  'preds_diff': 'Preds diff',
  'model_diff': 'Model diff',
  'model_cos': 'Model cos',
}


class Layer(NamedTuple):
  """An attention layer without its parameters."""

  normalise: Callable[[Any], Any]  # Scores `[M, n]` to attention weights.
  signs: tuple[float, ...]  # Initial outputs of heads; 0 stays silent.


LAYERS = {
  'linear': Layer(lambda scores: scores / scores.shape[1], (1.0,)),
  'softmax, one head': Layer(lambda s: jax.nn.softmax(s, axis=1), (1.0,)),
  PUBLISHED: Layer(lambda s: jax.nn.softmax(s, axis=1), (1.0, -1.0)),
}


class Curves(NamedTuple):
  """A layer beside one gradient step. Shapes `[frames, seeds, records]`."""

  loss_ratio: Any  # Loss of the layer over that at the start.
  gd_ratio: Any  # Loss of the step over that at the start.
  loss_over_gd: Any  # Loss of the layer over that of the step.
  preds_diff: Any  # Distance of the predictions over the move of the step.
  model_diff: Any  # Distance of the slopes in the query over that of the step.
  model_cos: Any  # Cosine of these slopes.
  logit_cos: Any  # Cosine of the logits.
  preds_diff_absolute: Any  # `preds_diff` as published, not divided.
  model_diff_absolute: Any  # `model_diff` as published, not divided.


class Results(NamedTuple):
  """Trained layers by name and size, and the steps that they are beside."""

  runs: Mapping[tuple[str, Size], Curves]
  steps: one_step.Results


def measure(config: Config) -> Results:
  steps = one_step.measure(config)
  few, middle = config.num_words[0], config.middle
  jobs = {(few, middle): tuple(LAYERS), (few, config.widths[0]): (PUBLISHED,)}
  # The cost of a layer is quadratic in n: not at the largest.
  jobs |= {(n, middle): (PUBLISHED,) for n in config.num_words[1:-1]}
  runs: dict[tuple[str, Size], Curves] = {}
  for size, names in jobs.items():
    factors = steps[size].rate_weights.mean(axis=1)
    rates = jnp.asarray(factors * unit_rate(size), float)

    def fit(rates, size=size, names=names):
      return train(config, names, size, rates)

    found = lab.compute(fit, rates)
    runs |= {(name, size): found[name] for name in names}
  return Results(runs, steps)


def initialise(key: Any, layer: Layer, width: int) -> dict[str, Any]:
  """Draws parameters: each head has queries, keys and an output weight."""
  keys = jax.random.split(key)
  shape = len(layer.signs), width, width
  return {
    'queries': jax.random.normal(keys[0], shape) / width**0.5,
    'keys': jax.random.normal(keys[1], shape) / width**0.5,
    'outputs': jnp.asarray(layer.signs, float),
  }


def answer(layer: Layer, params: Any, posed: account.Problem, queries: Any):
  """Logits of the queries; values are the targets, less their mean, alone."""
  num_words, width = posed.document.shape
  rate = unit_rate((num_words, width))
  values = rate * (posed.target - 1 / num_words)

  def head(into_queries, into_keys, output):
    scores = (queries @ into_queries) @ (posed.document @ into_keys).T
    return output * (layer.normalise(scores) @ values)

  heads = params['queries'], params['keys'], params['outputs']
  return jnp.sum(jax.vmap(head)(*heads), axis=0)


def train(
  config: Config, names: tuple[str, ...], size: Size, rates: Any
) -> dict[str, Curves]:
  """Trains layers on the same fresh tasks, for all frames and seeds.

  Beside gradient descent with one rate for each frame.
  """
  schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  batch = max(1, config.words_per_batch // size[0])

  def loss_of(name, params, tasks):
    def one(task):
      logits = answer(LAYERS[name], params, task.posed, task.queries)
      error = jax.nn.softmax(logits) - task.answer
      start = task.answer - 1 / size[0]
      return jnp.sum(error**2), jnp.sum(start**2)

    ours, start = jax.vmap(one)(tasks)
    return jnp.mean(ours) / jnp.mean(start)

  def one_run(key, frame, rate):
    key_start, key_tasks, key_test = jax.random.split(key, 3)

    def tasks_of(key, count):
      keys = jax.random.split(key, count)
      return jax.vmap(lambda k: draw(k, size, frame))(keys)

    def next_tasks(index):
      return index + 1, tasks_of(jax.random.fold_in(key_tasks, index), batch)

    records = loops.train(
      lambda p, tasks: sum(loss_of(k, x, tasks) for k, x in p.items()),
      {  # All from the same key, as if each were alone.
        name: initialise(jax.random.clone(key_start), LAYERS[name], size[1])
        for name in names
      },
      next_tasks,
      jnp.array(0),
      optax.partition(dict.fromkeys(names, optimizer), {k: k for k in names}),
      num_steps=config.num_steps,
      record_every=config.num_steps // config.num_records,
    )
    test = tasks_of(key_test, config.num_test)
    return {
      name: jax.lax.map(
        lambda p, name=name: compare(LAYERS[name], p, test, rate), params
      )
      for name, params in records.items()
    }

  def one_frame(frame, rate):
    return jax.vmap(lambda key: one_run(key, frame, rate))(keys)

  keys = seed_keys(config, size, 1)
  # What does not depend on the frame, such as documents, is drawn once.
  return jax.vmap(one_frame)(jnp.arange(len(FRAMES)), rates)


def compare(layer: Layer, params: Any, tests: Tasks, rate) -> Curves:
  """Compares a layer with one gradient step, in means over tasks."""

  def one(task):
    def ours(queries):
      return answer(layer, params, task.posed, queries)

    zero = jnp.zeros(task.posed.document.shape[1], task.answer.dtype)
    weights = account.weight_shift(task.posed, zero, learning_rate=rate)
    logits = ours(task.queries)
    steps = account.attend(task.posed, task.queries, learning_rate=rate)
    # A logit depends on its own query alone: one gradient has all rows.
    slopes = jax.grad(lambda q: jnp.sum(ours(q)))(task.queries)
    f, g = jax.nn.softmax(logits), jax.nn.softmax(steps)
    start = 1 / task.answer.shape[0]
    size = jnp.linalg.norm(weights)
    cosines = (slopes @ weights) / (jnp.linalg.norm(slopes, axis=1) * size)
    away = jnp.linalg.norm(slopes - weights[None], axis=1)
    return {
      'loss': jnp.sum((f - task.answer) ** 2) / 2,
      'loss_gd': jnp.sum((g - task.answer) ** 2) / 2,
      'loss_start': jnp.sum((start - task.answer) ** 2) / 2,
      'preds_diff': jnp.linalg.norm(f - g),
      'preds_move': jnp.linalg.norm(g - start),
      'model_diff': jnp.mean(away),
      'model_size': size,
      'model_cos': jnp.mean(cosines),
      'logit_cos': cosine(logits, steps),
    }

  mean = jax.tree.map(jnp.mean, jax.vmap(one)(tests))
  return Curves(
    loss_ratio=mean['loss'] / mean['loss_start'],
    gd_ratio=mean['loss_gd'] / mean['loss_start'],
    loss_over_gd=mean['loss'] / mean['loss_gd'],
    preds_diff=mean['preds_diff'] / mean['preds_move'],
    model_diff=mean['model_diff'] / mean['model_size'],
    model_cos=mean['model_cos'],
    logit_cos=mean['logit_cos'],
    preds_diff_absolute=mean['preds_diff'],
    model_diff_absolute=mean['model_diff'],
  )


def claims(config: Config, results: Results) -> lab.Claims:
  few, middle = config.num_words[0], config.middle
  curves = results.runs[PUBLISHED, (few, middle)]
  for frame, name in enumerate(FRAMES):
    where = f'n = {few}, d = {middle}, {name}'
    start, end = (Curves(*(x[frame, :, t] for x in curves)) for t in (0, -1))
    slug, nearer = name.replace(' ', '-'), end.preds_diff / start.preds_diff
    found = {
      'loss': lab.within(1 - CLOSE_LOSS, 1 + CLOSE_LOSS, end.loss_over_gd),
      'cosine-rises': lab.at_least(1e-9, end.model_cos - start.model_cos),
      'cosine': lab.at_least(CLOSE_COSINE, end.model_cos),
      'predictions': lab.at_most(1 - 1e-9, nearer),
    }
    yield from statements(
      f"""
      {slug}-loss [{LI}, figures] the trained layer reaches the loss of one
        gradient step | loss of the layer over that of the step; {where}
      {slug}-cosine-rises [{LI}, figures] Model cos rises with training | Model
        cos at the end less that at the start; {where}
      {slug}-cosine [{LI}, figures] the trained layer is sensitive to its
        queries as the step is | Model cos at the end; {where}
      {slug}-predictions [{LI}, figures] predictions come closer with training |
        Preds diff at the end over that at the start; {where}
      """,
      {f'{slug}-{key}': x for key, x in found.items()},
    )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  runs = f'means over {config.num_seeds} repetitions with 95 % intervals'
  during = f"""Self-attention layers during training, against one gradient step
    on softmax regression with the best common rate (n = {config.num_words[0]}
    words of width {config.middle}): {runs}. Left: target independent of the
    document, predicted for the same words. Right: the words of a new document.
    Preds diff and Model diff are divided by the size of what the step does: 1
    is as far as no step at all. Curves that leave a panel start above it."""
  sizes = f"""Loss after one gradient step, relative to the start: {runs}.
    Dotted: the linearised closed form for the frame in place. Diamonds and
    crosses: the layer with two heads, trained {config.num_steps} steps."""
  return [
    lab.Figure('training', _draw_training(config, results), during),
    lab.Figure('sizes', _draw_sizes(config, results), sizes),
  ]


def _draw_training(config: Config, results: Results) -> Any:
  size = config.num_words[0], config.middle
  figure, axes = drawing.subplots(4, 2, figsize=(11, 12), sharex=True)
  steps = np.linspace(0, config.num_steps, config.num_records + 1)
  for row, (metric, label) in zip(axes, PANELS.items(), strict=True):
    for frame, axis in enumerate(row):
      for index, name in enumerate(LAYERS, start=1):
        samples = getattr(results.runs[name, size], metric)[frame]
        look = drawing.look(index) | {'label': name, 'mfc': 'white', 'ms': 5}
        drawing.means(axis, steps, samples, **look)
      axis.set_ylim(0, 1.7)
    row[0].set_ylabel(label)
  for frame, name in enumerate(FRAMES):
    ratio = results.runs['linear', size].gd_ratio[frame, :, -1].mean()
    black: Any = {'color': drawing.BLACK, 'ls': ':'}
    axes[0, frame].axhline(ratio, label='one gradient step', **black)
    axes[0, frame].set(title=name, ylim=(0, 1.5))
    axes[3, frame].axhline(1, **black)
    axes[3, frame].set(xlabel='training steps', ylim=(-0.15, 1.08))
  drawing.legend(axes[0, 0], 4, 'outside upper center')
  return figure


def _draw_sizes(config: Config, results: Results) -> Any:
  """One gradient step against words and width, and the published layer."""
  middle, most = config.middle, config.num_words[-1]
  figure, axes = drawing.subplots(1, 2, figsize=(11, 4.6), sharey=True)
  by_words = [(n, middle) for n in config.num_words]
  cells = by_words, [(most, d) for d in config.widths]
  looks = (drawing.BLUE, 'o', '-', 'D'), (drawing.ORANGE, 's', '--', 'x')
  for index, (axis, line) in enumerate(zip(axes, cells, strict=True)):
    x = np.array([cell[index] for cell in line], float)
    trained = [cell for cell in line if (PUBLISHED, cell) in results.runs]
    for frame, (colour, marker, ls, sign) in enumerate(looks):
      steps = [results.steps[cell].ratio_weights[frame] for cell in line]
      look: Any = {'color': colour, 'marker': marker, 'ls': ls, 'mfc': 'white'}
      label = f'one gradient step, {FRAMES[frame]}'
      drawing.means(axis, x, np.transpose(steps), label=label, **look)
      ratios = [results.runs[PUBLISHED, cell].loss_ratio for cell in trained]
      ends = [ratio[frame, :, -1].mean() for ratio in ratios]
      places = [cell[index] for cell in trained]
      sizes: Any = {'ms': 8, 'mfc': 'none'}
      label = f'trained layer, {FRAMES[frame]}'
      axis.plot(places, ends, sign, color=colour, label=label, **sizes)
    theory = [n / (n + d) for n, d in line]
    axis.plot(x, theory, ':', color=drawing.BLACK, label='n / (n + d)')
    drawing.size_axis(axis, x)
    axis.axhline(1, color=drawing.GREY, lw=0.8)
  axes[0].set(title=f'd = {middle}', xlabel='words n')
  axes[1].set(title=f'n = {most}', xlabel='width d')
  axes[0].set(ylabel='loss / loss at start', ylim=(0, None))
  drawing.legend(axes[0], 1, 'outside right upper')
  return figure


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'trained_layers': [
      {'layer': layer, 'num_words': n, 'width': d, 'frame': name}
      | {k: statistics.mean(x[i, :, -1]) for k, x in curves._asdict().items()}
      for (layer, (n, d)), curves in results.runs.items()
      for i, name in enumerate(FRAMES)
    ]
  }


def metrics(config: Config, results: Results) -> lab.Metrics:
  every = config.num_steps // config.num_records
  for (layer, (n, d)), curves in results.runs.items():
    yield from lab.tidy(
      {'layer': layer, 'num_words': n, 'width': d},
      curves._asdict(),
      frame=FRAMES,
      repetition=range(config.num_seeds),
      step=range(0, config.num_steps + 1, every),
    )
