"""What finetuning and learning in context have in common, with controls."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.changed_learning import area
from experiments.finetuning import runs
from experiments.lab import models, texts

TASKS = tuple(texts.TASKS)
# Rates of blocks that learn alone, whose slopes are larger, and of all
# parameters, over those of keys and values, of which the largest is too large.
FACTORS = {'layers': 0.1, 'all': 1.0}


class Way(NamedTuple):
  """How examples are learnt, or shown."""

  kind: str = 'right'  # Or flipped labels, another task, text without labels.
  only: bool = False  # Whether the loss is that of labels alone.
  sign: float = 1.0
  in_turn: bool = True
  order: int = 0


RIGHT, ONLY = Way(), Way(only=True)
# What is shown, and finetuned on.
SHOWN = {
  'FT': RIGHT,
  'flipped labels': Way('flipped'),
  'another task': Way('other'),
  'other text': Way('text'),
  'second order': Way(order=1),
  'third order': Way(order=2),
}
TAUGHT = SHOWN | {
  'ascent': Way(sign=-1.0),
  'one batch': Way(in_turn=False),
  'labels alone': ONLY,
}


class Builder:
  """Makes runs of texts, as arrays of one shape."""

  def __init__(self, config, tokenizer):
    self.config, self.tokenizer = config, tokenizer
    self.end = [tokenizer.single_id('\n')] * 2
    rows = [self.ids(texts.TASKS[x].instruction.strip()) for x in config.tasks]
    # On the left: the first token of an example is predicted from the last one.
    flipped = pad([x[::-1] for x in rows], max(map(len, rows)))
    self.begins = jax.tree.map(lambda x: x[:, ::-1], flipped)
    self.rows: dict[Any, list[texts.Review]] = {}
    for seed, name in itertools.product(range(config.num_seeds), config.tasks):
      others = (
        x for key, of in self.rows.items() if key[1] == seed for x in of
      )
      rows = self.draw(name, seed, {x.text for x in others})
      shown = rows[: config.num_demonstrations]
      most = sum(len(self.example(name, x)) - 2 for x in shown)
      enough = config.num_ordered <= most
      config.require(enough, 'num_ordered', f'at most {most} here')
      self.rows[name, seed] = rows

  def ids(self, text: str, *more: int) -> list[int]:
    return [*self.tokenizer.encode(text), *more, *self.end]

  def example(self, name, row, kind='right') -> list[int]:
    if kind == 'text':
      return self.ids(row.text)
    task, first = texts.TASKS[name], row.positive != (kind == 'flipped')
    label = self.tokenizer.single_id(task.labels[not first])
    return self.ids(task.template.format(row.text), label)

  def draw(self, name, seed, taken) -> list[texts.Review]:
    """Texts that are short enough, alternately of both kinds, none `taken`."""
    config = self.config
    sizes = config.num_demonstrations, config.more_demonstrations
    needed = max(sizes) + config.num_queries + config.num_held_out
    seed += config.num_seeds * config.seed
    options = {'seed': seed, 'min_words': 4, 'max_words': 14}
    kinds: dict[bool, dict[str, texts.Review]] = {True: {}, False: {}}
    try:
      found = texts.TASKS[name].draw(9 * max(-(-needed // 2), 20), **options)
    except ValueError:  # It has not so many.
      found = []
    for row in found:
      is_short = len(self.example(name, row)) <= config.max_tokens
      if is_short and row.text not in taken:
        kinds[row.positive][row.text] = row
    enough = 2 * min(map(len, kinds.values())) >= needed
    what = f'fewer, or fewer demonstrations: {name} has no {needed} texts'
    what += f' of {config.max_tokens} max_tokens'
    config.require(enough, 'num_queries', what)
    pairs = zip(*(x.values() for x in kinds.values()), strict=False)
    return [row for pair in pairs for row in pair][:needed]

  def build(self, task: int, seed: int, size: int, ways, shown, held_out: int):
    """A run, and which queries are positive; `ways` are of way and rate."""
    config, tasks = self.config, self.config.tasks
    name = tasks[task]
    rng = np.random.default_rng([config.seed, task, seed])
    begin = jax.tree.map(lambda x: x[task], self.begins)

    def slots(way):
      other = name if way.kind in ('right', 'flipped') else tasks[task - 1]
      rows = self.rows[other, seed][:size]
      order = np.random.default_rng([way.order, seed]).permutation(size)
      found = [self.example(other, rows[x], way.kind) for x in order]
      return pad(found, config.max_tokens)

    def prefix(text):
      return jax.tree.map(lambda x, y: np.append(x, y.ravel()), begin, text)

    def arm(way, rate):
      text = slots(way)
      weights = text.mask & (behind(text.mask) > 2)
      if way.only:
        weights &= behind(weights) == 1
      rate = np.float32(way.sign * rate)
      return runs.Arm(text, weights.astype('f'), rate, np.array(way.in_turn))

    right, most = slots(RIGHT), config.max_tokens
    flat, length = right.tokens.ravel(), int(right.mask.sum())
    rows = [self.ids(x.text) for x in self.rows[tasks[task - 2], seed]]
    rows = [[*np.concatenate(rows)[: length - 2], *self.end]]
    quiet = prefix(pad(rows, right.mask.size))
    other = np.arange(right.mask.size)
    order = rng.permutation(np.flatnonzero(right.mask))
    other[order] = np.roll(order, 1)
    real = np.flatnonzero(right.mask & (behind(right.mask) > 2))
    some = np.sort(rng.choice(real, config.num_ordered, replace=False))
    asked = self.rows[name, seed][-held_out - config.num_queries :]
    labels = [self.tokenizer.single_id(x) for x in texts.TASKS[name].labels]
    run = runs.Run(
      seed=np.uint32(rng.integers(2**31)),
      begin=begin,
      start=np.int32(length),
      queries=pad([self.example(name, x)[:-3] for x in asked], most - 3),
      labels=np.array(labels, np.int32),
      shown=stacked([prefix(slots(x)) for x in shown]),
      neutral=quiet if len(shown) > 2 else None,
      arms=stacked([arm(*x) for x in ways]),
      mask=right.mask,
      some=some,
      other=other,
      label_places=right.mask.sum(axis=1) - 3 + np.arange(size) * most,
      frequency=(flat[some][:, None] == flat[right.mask.ravel()]).sum(axis=1),
    )
    return run, np.array([x.positive for x in asked])


def pad(rows, length) -> runs.Text:
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.arange(length) < np.array([*map(len, rows)])[:, None]
  tokens[mask] = np.concatenate(rows)
  return runs.Text(tokens, mask)


def behind(mask):
  """How many are left in a row, from each on."""
  return np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]


def stacked(trees):
  return jax.tree.map(lambda *x: np.stack(x), *trees)


class Stage(NamedTuple):
  """What was measured of all runs: metrics `[tasks, seeds, A, ...]`."""

  names: list[tuple[Way, float]]  # Ways of finetuning and rates, first task.
  found: dict[str, np.ndarray]
  odds: np.ndarray  # Zero-shot, then of what is shown. `[.., 1 + P, Q]`.
  overlap: np.ndarray  # Of answers zero-shot and in context.
  right: np.ndarray  # Which first labels are right. Shape `[.., Q]`.


class Results(NamedTuple):
  stages: dict[str, Stage]
  rates: dict[str, np.ndarray]  # Chosen ones, by method and task.


@jax.default_matmul_precision('highest')
def measure(config) -> Results:
  model, tokenizer = models.load(config)
  builder, held = Builder(config, tokenizer), config.num_held_out
  small, *rest = config.rates
  stages, rates = {}, {}

  def stage(name, ways, shown=(RIGHT,), held=0, size=0, model=model):
    """Measures all runs; `ways(task)` are pairs of way and rate."""
    size = size or config.num_demonstrations
    places = np.ndindex(len(config.tasks), config.num_seeds)
    built = [builder.build(*x, size, ways(x[0]), shown, held) for x in places]
    data, right = (stacked(x) for x in zip(*built, strict=True))
    method = name if name in runs.METHODS else 'keys and values'
    some = {'followed': config.num_followed, 'tested': config.num_queries}

    def step(model, carry, number):
      run = jax.tree.map(lambda x: jnp.asarray(x)[number], data)
      return carry, runs.measure(model, run, method, **some)

    options: Any = {'block_size': 1, 'name': name, 'shared': (model,)}
    found = lab.scan_blocks(step, jnp.zeros(()), len(built), **options)[1]
    found = jax.tree.map(
      lambda x: np.reshape(x, (len(config.tasks), -1, *x.shape[1:])),
      (*found, right),
    )
    stages[name] = Stage(ways(0), *found)

  def choose(name, stage, way):
    """The rate whose answers order the queries held out best, by task."""
    of = [i for i, x in enumerate(stage.names) if x[0] == way and x[1] > 0]
    odds = stage.found['odds'][:, :, of, :held]
    score = area(odds, stage.right[:, :, None, :held]).mean(axis=1)
    best = np.argmax(np.nan_to_num(score), axis=1)  # Too large ones diverge.
    rates[name] = np.array([stage.names[of[x]][1] for x in best])

  def chosen(ways):
    keys = [(x, 'labels' if x.only else 'rates') for x in ways]
    return lambda task: [(x, rates[key][task]) for x, key in keys]

  swept = [(RIGHT, x) for x in (0.0, -small, small, *rest)]
  swept += [(ONLY, x) for x in rest[:3]]
  stage('rates', lambda task: swept, held=held)
  for name, way in (('rates', RIGHT), ('labels', ONLY)):
    choose(name, stages['rates'], way)
  stage('controls', chosen(TAUGHT.values()), [*SHOWN.values()])
  pair = RIGHT, SHOWN['flipped labels']
  stage('longer', chosen(pair), pair, size=config.more_demonstrations)
  for name, kept in (('untrained', False), ('embeddings', True)):
    stage(name, chosen([RIGHT]), model=untrain(model, config.seed, kept))
  for name, factor in FACTORS.items():
    own = [(RIGHT, factor * x) for x in config.rates[:-1]]
    stage(name, lambda task, own=own: own, held=held)
    choose(name, stages[name], RIGHT)
  return Results(stages, rates)


def untrain(model, seed: int, kept: bool):
  """Draws matrices anew, of the same spread; embeddings and norms as `kept`."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    inside = 'blocks' in str(path[0])
    if x.ndim <= 1 + inside or (kept and not inside):
      return x if kept else jnp.ones_like(x)
    return jnp.asarray(rng.standard_normal(x.shape, 'f') * np.std(x), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, model)
