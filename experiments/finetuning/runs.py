"""One run: a model is asked, finetuned, asked again, and compared.

Axes beside those of the library: `Q` queries, `S` demonstrations in slots of
`T` tokens with padding, `A` ways of finetuning, `P` versions of a prompt.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from iclcl_jax import pretrained, transformer
from iclcl_jax.accounts import meta_optimizer_metrics as scoring

TOP, DRAWS = 10, 2


class Text(NamedTuple):
  tokens: Any  # Shape `[N]`.
  mask: Any  # Which are no padding.


class Cache(NamedTuple):
  keys: Any  # Of each layer, or one. Shape `[L, G, N, d]`.
  values: Any
  positions: Any  # Shape `[N]`.
  mask: Any

  def __add__(self, other: Any) -> 'Cache':
    """This one, then that of more tokens."""
    pairs = zip(self, other, (-2, -2, -1, -1), strict=True)
    return Cache(*(jnp.concatenate([x, y], axis) for x, y, axis in pairs))


class Trace(NamedTuple):  # What the last token does in each layer, `[L, ...]`.
  output: Any  # Of the attention, behind the projection. `[d_model]`.
  heads: Any  # Before it. `[H, d]`.
  scores: Any  # Logits on the text, before the softmax, 0 for padding.
  earlier: Any  # Likewise on the prefix. `[H, N]`.


class Answer(NamedTuple):
  odds: Any  # Log-odds of the first label.
  top: Any  # The likeliest tokens, `[TOP]`.
  query: Any  # Of the last token, not rotated. `[L, H d]`.
  trace: Trace
  cache: Any  # Of the tokens of the query.


class Arm(NamedTuple):  # A way of finetuning.
  texts: Text  # Examples in the order in which they are learnt, `[S, T]`.
  weights: Any  # Of the surprise of each token in the loss. Shape `[S, T]`.
  rate: Any  # Negative: ascent.
  in_turn: Any  # Whether a step begins where the last one ended.


class Lesson(NamedTuple):  # What finetuning did at each example.
  loss: Any  # Before the step. Shape `[S]`.
  queries: Any  # Of its tokens, not rotated. Shape `[S, T, L, H d]`.
  errors: Any  # Minus the slopes by its values. Shape `[S, T, L, G, d]`.


class Run(NamedTuple):  # One task and seed: what is read, shown, and taught.
  seed: Any  # Of what nulls draw.
  begin: Text  # The instruction, padded on the left.
  start: Any  # Its position where nothing is shown.
  queries: Text  # Shape `[Q, T]`.
  labels: Any  # Ids of both labels.
  shown: Text  # Instruction and demonstrations. Shape `[P, N]`.
  neutral: Text | None  # Instruction and other text of the same length.
  arms: Arm  # Shape `[A, ...]`.
  # Places among the slots `S T` of the first version: which are no padding, a
  # few at random in their order, another one for each, and those of labels.
  mask: Any
  some: Any  # Shape `[K]`.
  other: Any
  label_places: Any
  frequency: Any  # Of the tokens `some` in all demonstrations. Shape `[K]`.


def advance(model, block, x, own: Cache, before: Cache | None, shift: Any):
  """The stream behind a block, its cache, queries `[N, H d]`, and trace.

  `own` says where the tokens stand; the `shift` is added to their values.
  """
  kind, last = model.architecture, jnp.sum(own.mask) - 1
  new = transformer.heads(kind, block, x, positions=own.positions)
  plain = transformer.heads(kind, block, x, positions=0 * own.positions).queries
  own = own._replace(keys=new.keys, values=new.values + shift)
  seen = own if before is None else before + own
  heads = new._replace(keys=seen.keys, values=seen.values)
  outputs = transformer.attend(
    kind, heads, own.positions, seen.positions, mask=seen.mask
  )
  query, output = new.queries[:, last], outputs[:, last]
  rows = query.reshape(len(new.keys), -1, query.shape[1])
  scores = jnp.einsum('grd,gnd->grn', rows, seen.keys) / query.shape[1] ** 0.5
  scores = jnp.where(seen.mask[None, None], scores, 0).reshape(len(query), -1)
  earlier, scores = jnp.split(scores, [scores.shape[1] - len(x)], axis=1)
  merged = jnp.einsum('hd,hdm->m', output, block.output.weight)
  queries = jnp.swapaxes(plain, 0, 1).reshape(len(x), -1)
  y = transformer.complete(kind, block, x, outputs)
  return y, (own[:2], queries, Trace(merged, output, scores, earlier))


def placed(text: Text, start: Any = 0) -> Cache:
  """Where tokens stand that follow `start` others."""
  place = jnp.maximum(jnp.cumsum(text.mask, dtype='int32') - 1, 0)
  return Cache(None, None, start + place, text.mask)


def read(model, text: Text, start: Any = 0, before=None, shift: Any = None):
  """Reads a text behind a prefix, if any: as `advance`, of all layers."""
  own, x = placed(text, start), pretrained.embed(model, text.tokens)
  if shift is None:
    shift = jnp.zeros(model.num_layers, x.dtype)

  def layer(x, block, keys, shift):
    seen = None if keys is None else Cache(*keys, *before[2:])
    return advance(model, block, x, own, seen, shift)

  keys = None if before is None else before[:2]
  x, (keys, queries, trace) = transformer.scan_blocks(
    model.architecture, model.blocks, layer, x, keys, shift
  )
  return x, own._replace(keys=keys[0], values=keys[1]), queries, trace


def unembed(model, x):
  norm = model.architecture.normalization
  rows = jax.vmap(lambda row: norm(model.final_norm, row))(x)
  return pretrained.unembed(model, rows)


def ask(model, prefix: Text, texts: Text, labels, start=0):
  """A prefix, read once, and the answers of all queries `[Q, T]` behind it."""
  cache = read(model, prefix, start)[1]
  start = start + jnp.sum(prefix.mask, dtype='int32')

  def one(text):
    x, own, rows, trace = read(model, text, start, cache)
    last = jnp.sum(text.mask) - 1
    logits = unembed(model, x[last][None])[0]
    odds, top = (
      logits[labels[0]] - logits[labels[1]],
      jax.lax.top_k(logits, TOP),
    )
    return Answer(odds, top[1], rows[:, last], trace, own)

  return cache, jax.vmap(one)(texts)


def surprise(model, x, tokens, weights):
  """Mean surprise of the last tokens, by weight, at the end of the stream."""
  size = len(weights)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    unembed(model, x[-size - 1 : -1]), tokens[-size:]
  )
  return jnp.sum(losses * weights) / jnp.sum(weights)


def take(model):
  """What is finetuned, if not all parameters."""
  return model.blocks.key, model.blocks.value


def put(model, params):
  blocks = model.blocks._replace(key=params[0], value=params[1])
  return dataclasses.replace(model, blocks=blocks)


def whole(model, params, text, weights, shift, put=put):
  """Loss and queries `[L, T, H d]`; slopes by parameters and values."""

  def loss(params, shift):
    tuned = put(model, params)
    x, _, queries, _ = read(tuned, text, shift=shift)
    return surprise(tuned, x, text.tokens, weights), queries

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, shift)


def layerwise(model, params, text, weights, shift):
  """Likewise where each block learns from its own output alone.

  Its input is a constant, and the frozen final norm and unembedding read its
  output; the loss is the sum over blocks.
  """

  def layer(x, block, shift):
    def loss(own, shift):
      changed = block._replace(key=own[0], value=own[1])
      y, found = advance(model, changed, x, placed(text), None, shift)
      return surprise(model, y, text.tokens, weights), (y, found[1])

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (y, queries)), slopes = both((block.key, block.value), shift)
    return y, (value, queries, slopes)

  x, blocks = pretrained.embed(model, text.tokens), put(model, params).blocks
  _, (losses, queries, slopes) = transformer.scan_blocks(
    model.architecture, blocks, layer, x, shift
  )
  return (losses[-1], queries), slopes


# How what is finetuned is taken and put back, and its slopes.
METHODS: dict[str, tuple[Callable[..., Any], ...]] = {
  'keys and values': (take, put, whole),
  'layers': (take, put, layerwise),
  'all': (
    lambda x: x,
    lambda *x: x[1],
    functools.partial(whole, put=lambda *x: x[1]),
  ),
}


def finetune(model, prefix: Text, arm: Arm, method: str):
  """One pass over the examples behind the prefix, a step of SGD for each."""
  take, put, slopes_of = METHODS[method]
  begin, start = len(prefix.tokens), take(model)
  layers, _, groups, width = model.blocks.key.weight.shape
  size = begin + arm.texts.tokens.shape[1]
  shift = jnp.zeros((layers, groups, size, width), model.embedding.dtype)

  def step(params, example):
    text, weights = Text(*map(jnp.append, prefix, example[0])), example[1]
    used = jax.tree.map(lambda *x: jnp.where(arm.in_turn, *x), params, start)
    (loss, queries), slopes = slopes_of(model, used, text, weights, shift)
    params = jax.tree.map(lambda x, y: x - arm.rate * y, params, slopes[0])
    errors = -jnp.moveaxis(slopes[1], 2, 0)[begin:]
    return params, Lesson(loss, jnp.swapaxes(queries, 0, 1)[begin:], errors)

  params, lesson = jax.lax.scan(step, start, (arm.texts, arm.weights))
  return put(model, params), lesson


def _softmax(x):
  return jax.nn.softmax(jnp.where(x == 0, -jnp.inf, x), axis=-1)


_maps = scoring.map_similarity
# Of one layer in context, finetuned, and zero-shot: field of the trace, metric.
METRICS: dict[str, tuple[str, Callable[..., Any]]] = {
  'SimAOU': ('output', scoring.update_similarity),
  'SimAOU, normalised': ('output', scoring.normalised_update_similarity),
  'SimAOU, partial': ('output', scoring.partial_update_similarity),
  'size': (
    'output',
    lambda x, y, z: jnp.linalg.norm(y - z) / jnp.linalg.norm(x - z),
  ),
  'heads': ('heads', jax.vmap(scoring.update_similarity)),
  'SimAM, before': ('scores', lambda x, y, z: _maps(x, z)),
  'SimAM, after': ('scores', lambda x, y, z: _maps(x, y)),
  'SimAM, softmax': ('scores', lambda *x: _maps(*map(_softmax, x[:2]))),
  'SimAM-delta': ('scores', _maps),
}


def compare(shown: Trace, tuned: Trace, zero: Trace):
  """Metrics, mean over queries and layers that have an update at all."""

  def mean(field, of_layer):
    rows = [getattr(x, field) for x in (shown, tuned, zero)]
    found = jax.vmap(jax.vmap(of_layer))(*rows)
    return jnp.mean(jnp.nanmean(found, axis=1))

  return {name: mean(*metric) for name, metric in METRICS.items()}


def nulls(tuned: Trace, zero: Trace, seed: Any) -> dict[str, list[Trace]]:
  """Updates of other queries, and random ones of the size of each row.

  Where there is padding there is none; of queries tokens align from the left.
  """

  def changed(update):
    def draw(x, base):
      return base + jnp.where(base == 0, 0, update(x - base))

    return jax.tree.map(draw, tuned, zero)

  def permuted(number):
    return changed(lambda x: jnp.roll(x, number + 1, axis=0))

  def random(number):
    keys = iter(jax.random.split(jax.random.key(seed + number), len(tuned)))

    def noise(x):
      drawn = jax.random.normal(next(keys), x.shape, x.dtype)
      drawn = jnp.where(x == 0, 0, drawn)
      sizes = [jnp.linalg.norm(y, axis=-1)[..., None] for y in (x, drawn)]
      return drawn * sizes[0] / jnp.maximum(sizes[1], 1e-30)

    return changed(noise)

  draws = {'permuted': permuted, 'random': random}
  return {k: [x(i) for i in range(DRAWS)] for k, x in draws.items()}


def compare_each(triples: dict[str, list[tuple[Trace, Trace, Trace]]]):
  """Compares what is named, and takes the mean of each list."""
  rows = [x for own in triples.values() for x in own]
  every = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  found, begin = jax.lax.map(lambda x: compare(*x), every), 0
  for name, own in triples.items():
    part = slice(begin, begin := begin + len(own))
    yield from ((f'{k}{name}', x[part].mean()) for k, x in found.items())


def orders(shown: Answer, tuned: Answer, lesson: Lesson, run: Run):
  """How alike training tokens are ordered: Kendall, and recall of the first.

  In context by the logits of the last token, finetuned by the products of its
  query with theirs, none of them rotated.
  """
  size, length = run.mask.shape
  mask, few = run.mask.reshape(1, 1, 1, -1), max(1, size // 3)
  earlier = shown.trace.earlier[..., -size * length :]
  rows = lesson.queries.reshape(size * length, *lesson.queries.shape[2:])
  on, by = earlier.sum(axis=2), jnp.einsum('nld,qld->qln', rows, tuned.query)
  weights = jax.nn.softmax(jnp.where(mask, earlier, -jnp.inf)).sum(axis=2)
  mass, score = (
    x.reshape(*on.shape[:2], size, length).sum(axis=3)
    for x in (weights, jnp.where(mask[0], by, 0))
  )
  score = score / run.mask.sum(axis=1).astype(on.dtype)[None, None]
  first = [jax.lax.top_k(x, few)[1] for x in (mass, score)]
  same = jnp.sum(first[0][..., None] == first[1][..., None, :])
  some = on[..., run.some]
  noise = jax.random.uniform(jax.random.key(run.seed), some.shape)
  partners = {
    '': (some, by[..., run.some]),
    ', random': (some, noise),
    ', recency': (some, jnp.arange(some.shape[2])),
    ', frequency': (some, run.frequency),
    ', labels': (on[..., run.label_places], by[..., run.label_places]),
    ', examples': (mass, score),
  }
  found = {'recall less chance': same / first[0].size - few / size}
  for name, (x, y) in partners.items():
    y = jnp.broadcast_to(y, x.shape).astype(x.dtype)
    found[f'Kendall{name}'] = jax.vmap(jax.vmap(scoring.kendall))(x, y).mean()
  return found


def coefficients(shown: Cache, lesson: Lesson, run: Run):
  """Whether values are what slopes would be: the labels of both dual models.

  In context a head learns token `i` with the label `v_i`; finetuned its value
  projection learns it with minus the slope of the loss by `v_i`.
  """
  size, length, *_, width = lesson.errors.shape
  values = jnp.moveaxis(shown.values[:, :, -size * length :], 2, 0)
  errors, values = (
    x.reshape(size * length, -1, width) for x in (lesson.errors, values)
  )
  cosine = functools.partial(optax.cosine_similarity, axis=-1, epsilon=1e-30)
  places = {'': run.some, ', permuted': run.other[run.some]}
  return {
    f'coefficients{name}': jnp.mean(cosine(errors[x], values[run.some]))
    for name, x in places.items()
  }


def dual_weights(shown: Cache, tuned: Cache, zero: Cache, other: Any):
  """Cosines of what both add to the dual weights of a head, `sum v phi(k)`.

  In the space of the exponential kernel. Demonstrations add theirs; finetuning
  changes those of the query and of what is before it, `[Q, ...]`. Permuted are
  the labels of the demonstrations: their sum does not depend on the query.
  """

  def signed(cache, sign):
    mask = cache.mask[..., None, None, :, None]
    return cache.keys, jnp.where(mask, sign * cache.values, 0)

  def inner(one, two):
    """Of weights, each over the largest norm of its features; its rounding."""
    scale = sum(jnp.max(jnp.sum(x[0] ** 2, axis=1)) / 2 for x in (one, two))
    kernel = jnp.exp((one[0] @ two[0].T - scale) / one[0].shape[1] ** 0.5)
    terms = kernel * (one[1] @ two[1].T)
    noise = 8 * float(jnp.finfo(terms.dtype).eps) * jnp.sum(jnp.abs(terms))
    return jnp.sum(terms), noise

  def cosine(one, two):
    (size, _), (change, noise) = inner(one, one), inner(two, two)
    size = size * jnp.where(change > noise, change, jnp.nan)
    return inner(one, two)[0] / jnp.sqrt(size)

  pairs = zip(signed(tuned, 1), signed(zero, -1), strict=True)
  update = [jnp.concatenate(x, axis=3) for x in pairs]
  keys, labels = signed(shown, 1)
  every = jax.vmap(jax.vmap(jax.vmap(cosine)), in_axes=(None, 0))
  return {
    f'dual weights{name}': jnp.nanmean(every((keys, x), update))
    for name, x in {'': labels, ', permuted': labels[:, :, other]}.items()
  }


def measure(model, run: Run, method: str, *, followed, tested):
  """Asks, finetunes in all ways, asks again; what is found has an axis `A`.

  The last `tested` queries are compared, the first `followed` of these token by
  token.
  """
  first, many = len(run.queries.mask) - tested, len(run.arms.rate)

  def some(tree, size=tested):
    return jax.tree.map(lambda x: x[first : first + size], tree)

  def compared(trace):
    return some(trace._replace(earlier=None))

  def overlap(answer):
    same = some(right.top)[:, None] == some(answer.top)[:, :, None]
    return jnp.sum(same) / (tested * TOP)

  def seen(cache, answer):
    return jax.vmap(lambda x: cache + x)(some(answer.cache, followed))

  def answers(model, prefix, start=0):
    return ask(model, prefix, run.queries, run.labels, start)

  def show(number):
    prefix = jax.tree.map(lambda x: x[number], run.shown)
    cache, answer = answers(model, prefix)
    return cache, answer._replace(cache=None)

  before, zero = answers(model, run.begin, run.start)
  cache, right = show(0)
  wrong = jax.lax.map(lambda x: show(x)[1], jnp.arange(1, len(run.shown.mask)))
  begin, base = len(run.begin.tokens), compared(zero.trace)
  learnt = [x[:, :, begin:] for x in cache[:2]] + [x[begin:] for x in cache[2:]]
  shown = compared(right.trace)
  quiet = run.neutral and compared(answers(model, run.neutral)[1].trace)

  def teach(arm):
    tuned, lesson = finetune(model, run.begin, arm, method)
    own, answer = answers(tuned, run.begin, run.start)
    trace = compared(answer.trace)
    caches = seen(own, answer), seen(before, zero)
    pair = some((right, answer._replace(cache=None)), followed)
    triples = {'': [(shown, trace, base)]}
    for name, drawn in nulls(trace, base, run.seed).items():
      triples[f', {name}'] = [(shown, x, base) for x in drawn]
    for number in range(len(wrong.odds)):
      other = jax.tree.map(lambda x, i=number: x[i], wrong.trace)
      triples[f', shown {number + 1}'] = [(compared(other), trace, base)]
    if quiet:
      later = compared(answers(tuned, run.neutral)[1].trace)
      triples[', neutral'] = [(shown, later, quiet)]
    found = dict(compare_each(triples))
    found |= orders(*pair, lesson, run) | coefficients(cache, lesson, run)
    found |= dual_weights(Cache(*learnt), *caches, run.other)
    found |= {'overlap': overlap(answer), 'odds': answer.odds}
    return found | {'loss': lesson.loss}

  # Few at a time, if they are small: their products are larger.
  most = 4 if method == 'keys and values' else 1
  size = max(x for x in range(1, most + 1) if many % x == 0)
  found = jax.lax.map(teach, run.arms, batch_size=size)
  odds = jnp.concatenate([zero.odds[None], right.odds[None], wrong.odds])
  return found, odds, overlap(zero)
