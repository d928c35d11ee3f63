r"""What becomes of an answer if the heads of a language model learn otherwise?

Every head of a pretrained model answers by a dual model that takes each token
with rate 1, in one step on the contrastive loss. Here all heads learn
otherwise: demonstrations at other rates or not at all, each encoded without the
others and the states merged (so that no order is left), a second step on the
squared loss, a ridge of either sign, negatives. Two tasks: groups of words with
arbitrary labels, which only demonstrations can tell, and the sentiment of
reviews, which the model knows without any::

  python -m experiments.changed_learning --workdir=out/changed_learning

It took 36 minutes beside other work, and resumes when it is run again.
Expect, over 32 prompts of each task, the area under the curve of the answers
with its interval over resampled prompts, and the correlation of the change that
first order predicts with the actual one::

                     words           reviews         correlation, 12 of each
  as it is           .92 [.79, 1]    .73 [.52, .88]
  no demonstrations  .50 [.28, .71]  .90 [.77, .99]  .13 [-.64, .86]; .63
  half the rate      .92 [.80, 1]    .79 [.60, .92]  .98 [.93, 1.0]; .95
  twice the rate     .90 [.77, 1]    .64 [.42, .81]  .96 [.87, .99]; .98
  alone, merged      .57 [.36, .76]  .93 [.83, 1]    .26 [-.36, .92]; .79
  second step        .88 [.73, .99]  .73 [.54, .88]  .98 [.94, 1.0]; .99

So first order predicts small changes of what is learnt, of all heads at once,
and not what many removals do together. Demonstrations that are encoded alone
have no order (deviation over orders 5e-6, in sequence .56 and .76); that costs
the task which only they can tell, and helps where they do harm. No other loss
makes answers better beyond the interval; plain text costs up to 3 % of
perplexity.

References:
  Ratner et al., arXiv:2212.10947; Zhang et al., arXiv:2401.06469 (no order).
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.demonstration_deletion import prompts as prompting
from experiments.lab import figures as drawing, models, statistics, texts
from iclcl_jax import modified, pretrained
from iclcl_jax.pretrained import learning

MERGED = 'arXiv:2401.06469'
PLAIN, WITHOUT, ALONE = 'as it is', 'no demonstrations', 'alone, merged'
DOUBLE, TASKS = 'twice the rate', ('words', 'reviews')
BETTER = 1e-6  # No change at all is no gain.
WORDS = (
  'dog cat horse cow sheep goat pig lion tiger bear wolf fox rabbit mouse '
  'elephant monkey snake frog duck eagle',
  'France Spain Italy Germany Poland Norway Sweden Greece Turkey Egypt China '
  'Japan India Brazil Chile Peru Mexico Canada Kenya Cuba',
)
GROUPS = texts.Task(
  'Words and their groups.\n\n', 'Word: {}\nGroup:', (' A', ' B'), lambda: []
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(models.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_prompts: int = lab.option(32, 'prompts of a task', minimum=4, tiny=4)
  num_predicted: int = lab.option(
    12, 'of them whose change is predicted', at_most='num_prompts', tiny=2
  )
  num_demonstrations: int = lab.option(
    8, 'words that a prompt shows', minimum=2, maximum=16, tiny=2
  )
  num_reviews: int = lab.option(
    4, 'reviews that a prompt shows', minimum=2, maximum=16, tiny=2
  )
  num_orders: int = lab.option(
    3, 'orders of the same demonstrations', minimum=2, tiny=2
  )
  num_texts: int = lab.option(4, 'texts for the perplexity', minimum=2, tiny=2)
  num_tokens: int = lab.option(128, 'tokens of a text', minimum=8, tiny=12)
  max_tokens: int = lab.option(
    26, 'most tokens of a review as a demonstration', minimum=16
  )
  block_size: int = lab.count(12, 'prompts between checkpoints', tiny=4)


def _of_rates(segment_ids, size: int) -> list[learning.Learning]:
  """The ways of learning that leave the loss as it is."""
  hidden, half, double = (
    learning.with_rates(segment_ids, jnp.full(size, rate, jnp.float32))
    for rate in (0.0, 0.5, 2.0)
  )
  merged = learning.alone(segment_ids, num_segments=size)
  kept = jnp.arange(len(segment_ids), dtype='int32')
  ones = jnp.ones((len(segment_ids),) * 2, jnp.float32)
  plain = learning.Learning(rates=ones, positions=kept)
  return [
    plain,
    *(x._replace(positions=kept) for x in (hidden, half, double)),
    merged,
    merged._replace(positions=kept),
  ]


# Ways of learning by what one program serves: their numbers are data.
RATES = PLAIN, WITHOUT, 'half the rate', DOUBLE, ALONE, 'alone, places kept'
LOSSES: dict[str, dict[str, modified.Attention]] = {
  'steps': {
    'second step': modified.second_step(learning_rate=0.1),
    'outputs times 1.1': modified.second_step(learning_rate=0.0, momentum=0.1),
  },
  'ridges': {
    'ridge': modified.regularised(strength=0.1),
    'ridge, negative': modified.regularised(strength=-0.1),
  },
  'negatives': {
    'negatives': modified.token_negative(num_negatives=2, strength=0.05)
  },
}
OF_LOSSES = [arm for group in LOSSES.values() for arm in group]
ARMS = [*RATES, *OF_LOSSES]
ORDERED = PLAIN, ALONE, 'alone, places kept'


class Prompts(NamedTuple):
  """Prompts of both tasks, `P` in all, with `O` orders of demonstrations."""

  tokens: Any  # Shape `[P, O, N]`.
  segment_ids: Any  # Shape `[P, O, N]`.
  mask: Any  # Shape `[P, N]`.
  labels: Any  # Ids of both. Shape `[P, 2]`.


class Results(NamedTuple):
  """Log-odds of the first label, by way of learning."""

  answers: Mapping[str, np.ndarray]  # Of every order asked. Shape `[P, O]`.
  predicted: Mapping[str, np.ndarray]  # Change, to first order, `[P']`.
  right: np.ndarray  # Whether the first label is right. Shape `[P]`.
  asked: np.ndarray  # Prompts whose change is predicted. Shape `[P']`.
  perplexity: Mapping[str, np.ndarray]  # Over that of the model, by text.

  def of(self, task: str) -> slice:
    """The prompts of a task."""
    half = len(self.right) // 2
    return slice(half) if task == TASKS[0] else slice(half, None)


@jax.default_matmul_precision('highest')
def measure(config: Config) -> Results:
  """Asks all prompts with all ways of learning, in blocks that resume."""
  model, tokenizer = models.load(config)
  reviews = texts.TASKS['sentiment']
  count = config.num_prompts
  size = max(config.num_demonstrations, config.num_reviews)
  rows = [
    _words(config, tokenizer),
    prompting.make(config, tokenizer, reviews, count, config.num_reviews),
  ]
  prompts = _stack(config, tokenizer, rows, (GROUPS, reviews))
  arrays = jax.tree.map(jnp.asarray, prompts)
  plain = jnp.asarray(_texts(config, tokenizer))
  asked = np.add.outer([0, count], np.arange(config.num_predicted)).ravel()
  answers, predicted, perplexity = {}, {}, {}

  def ask(group, arms, make):
    orders = {x: config.num_orders if x in ORDERED else 1 for x in arms}
    wanted = [
      (prompt, order, arm)
      for arm, name in enumerate(arms)
      for prompt in range(2 * count)
      for order in range(orders[name])
    ]
    found = _scan(config, model, arrays, make, wanted, group, predict=False)
    changes = [(prompt, 0, arm) for arm in range(len(arms)) for prompt in asked]
    change = _scan(config, model, arrays, make, changes, group, predict=True)
    for name, some in zip(arms, np.split(change, len(arms)), strict=True):
      predicted[name] = some
      length = 2 * count * orders[name]
      answers[name] = found[:length].reshape(2 * count, -1)
      found = found[length:]

  ask('rates', RATES, lambda x: _stacked(_of_rates(x, size)))
  for group, arms in LOSSES.items():
    ways = [learning.Learning(attend=x) for x in arms.values()]
    ask(group, arms, lambda _, ways=ways: _stacked(ways))
    for arm, way in zip(arms, ways, strict=True):
      perplexity[arm] = np.array([_perplexity(model, x, way) for x in plain])
  right = np.concatenate([x.query_positive for x in rows])
  return Results(answers, predicted, right, asked, perplexity)


def _stacked(ways: list[learning.Learning]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack([*map(jnp.asarray, x)]), *ways)


def _scan(config, model, arrays, make, rows, group, predict: bool):
  """Asks rows of prompt, order and way of learning."""
  rows = jnp.asarray(rows)

  def step(model, carry, number):
    prompt, order, arm = rows[number]
    tokens = arrays.tokens[prompt, order]
    mask, (one, two) = arrays.mask[prompt], arrays.labels[prompt]
    ways = make(arrays.segment_ids[prompt, order])
    way = jax.tree.map(lambda leaf: leaf[arm], ways)
    if predict:
      found = learning.effect_on_answer(model, tokens, way, one, two, mask=mask)
      return carry, jnp.sum(found.predicted)
    scores = learning.logits(model, tokens, way, mask=mask)
    last = scores[jnp.sum(mask) - 1]
    return carry, last[one] - last[two]

  kind = 'predicted' if predict else 'answers'
  return lab.scan_blocks(
    step,
    jnp.zeros(()),
    len(rows),
    block_size=config.block_size,
    name=f'{kind}_{group}',
    description=f'{kind}, {group}',
    shared=(model,),
  )[1]


def _words(config: Config, tokenizer) -> prompting.Prompts:
  """Prompts in which it is drawn anew which group is called A."""
  rng = np.random.default_rng(config.seed)
  rows, kinds = [], []
  for number in range(config.num_prompts):
    groups = np.arange(config.num_demonstrations) % 2
    groups = np.append(rng.permuted(groups), number % 2)
    stock = [list(rng.permutation(words.split())) for words in WORDS]
    first = rng.integers(2)
    row = [texts.Review(stock[k].pop(), k == first, '') for k in groups]
    rows.append(prompting.encode(tokenizer, GROUPS, row))
    kinds.append([review.positive for review in row])
  return prompting.pad(rows, np.array(kinds))


def _stack(config: Config, tokenizer, rows, tasks) -> Prompts:
  """Both tasks in arrays of one length, in several orders."""
  length = max(prompts.tokens.shape[1] for prompts in rows)
  found = []
  for prompts, task in zip(rows, tasks, strict=True):
    orders = [_order(prompts, x) for x in range(config.num_orders)]
    places = np.stack(orders, axis=1)
    rest = length - prompts.tokens.shape[1]
    ids = [tokenizer.single_id(label) for label in task.labels]
    columns = prompts.tokens, prompts.segment_ids.astype(np.int32)
    tokens, segment_ids = (
      np.pad(
        np.take_along_axis(x[:, None], places, axis=2),
        [(0, 0), (0, 0), (0, rest)],
        constant_values=fill,
      )
      for x, fill in zip(columns, (0, -1), strict=True)
    )
    mask = np.pad(prompts.mask, [(0, 0), (0, rest)])
    labels = np.tile(ids, (len(places), 1))
    found.append(Prompts(tokens, segment_ids, mask, labels))
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def _texts(config: Config, tokenizer) -> np.ndarray:
  """Plain text: sentences of plots, `[T, N]`."""
  number = config.num_texts
  count = number * config.num_tokens // 4
  drawn = texts.draw_subjective(count, seed=config.seed)
  plots = [x.text for x in drawn if not x.positive]
  pieces = [' '.join(plots[x::number]) for x in range(number)]
  return np.stack([tokenizer.encode(x)[: config.num_tokens] for x in pieces])


def _order(prompts: prompting.Prompts, number: int) -> np.ndarray:
  """Places of the tokens with the demonstrations in another order, `[P, N]`."""
  rng = np.random.default_rng(number)
  found = []
  for segments in prompts.segment_ids:
    names = np.arange(prompts.positive.shape[1])
    names = rng.permutation(names) if number else names
    runs = [np.flatnonzero(segments == name) for name in names]
    inside = np.flatnonzero(segments >= 0)
    places = np.arange(len(segments))
    places[inside[0] : inside[-1] + 1] = np.concatenate(runs)
    found.append(places)
  return np.stack(found)


@lab.compile_quickly
def _perplexity(model, tokens, way) -> Any:
  """Perplexity of a text over that of the model as it is."""

  def surprise(logits):
    rows = jax.nn.log_softmax(logits[:-1])
    return -jnp.mean(jnp.take_along_axis(rows, tokens[1:, None], 1))

  changed = learning.logits(model, tokens, way)
  return jnp.exp(surprise(changed) - surprise(pretrained.logits(model, tokens)))


def area(answers: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Share of pairs `[..., P]` of different labels that answers order rightly.

  It is the area under the curve.
  """
  higher = answers[..., :, None] - answers[..., None, :]
  pairs = right[..., :, None] & ~right[..., None, :]
  share = np.sum(pairs * (np.sign(higher) + 1) / 2, axis=(-2, -1))
  return share / np.maximum(np.sum(pairs, axis=(-2, -1)), 1)


def areas(
  results: Results, task: str, arm: str, against: str | None = None
) -> lab.Estimate:
  """Area, less that of another way: the same resamples of prompts."""
  right = results.right[results.of(task)]

  def of(rows):
    found = [
      area(results.answers[x][results.of(task), 0][rows], right[rows])
      for x in (arm, against)
      if x is not None
    ]
    return found[0] - found[1] if against else found[0]

  return statistics.resampled(of, len(right), num_resamples=500)


def _row(results: Results, task: str, arm: str) -> dict[str, Any]:
  """All that is measured of one way of learning."""
  of = results.of(task)
  answers, right = results.answers[arm][of], results.right[of]
  inside = np.isin(results.asked, np.arange(len(results.right))[of])
  change = results.answers[arm][:, 0] - results.answers[PLAIN][:, 0]
  found: dict[str, Any] = {
    'area': areas(results, task, arm),
    'accuracy_calibrated': statistics.proportion(
      (answers[:, 0] > np.median(answers[:, 0])) == right
    ),
  }
  if arm != PLAIN:
    found['gain'] = areas(results, task, arm, PLAIN)
    predicted = results.predicted[arm][inside]
    actual = change[results.asked[inside]]
    found['prediction'] = statistics.resampled(
      lambda rows: statistics.correlation(predicted[rows], actual[rows]),
      len(predicted),
    )
  if arm in ORDERED:
    spread = np.std(answers, axis=1, ddof=1)
    found['deviation_over_orders'] = statistics.mean(spread)
    found['largest_deviation'] = float(np.max(spread))
  if arm in OF_LOSSES:
    price = statistics.geometric_mean(results.perplexity[arm])
    found['perplexity_ratio'] = price
  return found


def claims(config: Config, results: Results) -> lab.Claims:
  for task, rows in summary(config, results).items():
    found = {
      'taught': lab.at_most(0, rows[WITHOUT]['gain']),
      'no-order': lab.at_most(1e-3, rows[ALONE]['largest_deviation']),
      'order': lab.at_least(0.1, rows[PLAIN]['deviation_over_orders']),
      'merging': lab.at_least(-0.05, rows[ALONE]['gain']),
    }
    text = f"""
    taught [control] demonstrations teach the task of {task} | area under the
      curve without them less that with them, resampled prompts
    no-order [{MERGED}] demonstrations encoded alone and merged have no order,
      {task} | largest deviation of the log-odds over orders
    order [{MERGED}] in sequence their order matters, {task} | deviation of the
      log-odds over orders, mean over prompts
    merging [{MERGED}] merging costs no accuracy, {task} | area under the curve
      less that in sequence, resampled prompts"""
    for arm in ARMS[1:]:
      found[f'predicted-{arm}'] = lab.at_least(0.6, rows[arm]['prediction'])
      text += f"""
    predicted-{arm} [ours] first order predicts the change of the answer: {arm},
      {task} | correlation over {config.num_predicted} prompts, which are
      resampled"""
    for arm in (DOUBLE, *OF_LOSSES):
      found[f'gain-{arm}'] = lab.at_least(BETTER, rows[arm]['gain'])
      text += f"""
    gain-{arm} [ours] the answer is better with: {arm}, {task} | area under the
      curve less that of the model as it is, resampled prompts"""
    for claim in lab.statements('changed-learning-', text, found):
      name = f'{claim.id}-{task}'.replace(' ', '-').replace(',', '')
      yield dataclasses.replace(claim, id=name)


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {x: {arm: _row(results, x, arm) for arm in ARMS} for x in TASKS}


def tables(config: Config, results: Results) -> dict[str, Any]:
  columns = ['area', 'gain', 'accuracy_calibrated', 'prediction']
  columns += ['deviation_over_orders', 'perplexity_ratio']
  return {
    'changed_learning': [
      {'task': task, 'learning': arm}
      | {column: row.get(column, '') for column in columns}
      for task, rows in summary(config, results).items()
      for arm, row in rows.items()
    ]
  }


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 3, figsize=(15, 4.5))
  for index, task in enumerate(TASKS):
    look = {'color': drawing.look(index)['color'], 'offset': 0.25 * index}
    shown = {arm: areas(results, task, arm) for arm in ARMS}
    drawing.forest(axes[0], shown, label=task, **look)
  for arm in (WITHOUT, DOUBLE, ALONE, 'second step'):
    change = results.answers[arm][:, 0] - results.answers[PLAIN][:, 0]
    own = drawing.look(ARMS.index(arm)) | {'linestyle': 'none'}
    pair = results.predicted[arm], change[results.asked]
    axes[1].plot(*pair, markersize=4, label=arm, **own)
  axes[0].axvline(0.5, color=drawing.GREY, linewidth=1)
  axes[0].set_xlabel('area under the curve')
  axes[0].legend()
  axes[1].axline((0, 0), slope=1, color=drawing.GREY, linewidth=1)
  axes[1].set(xlabel='predicted change of the log-odds', ylabel='actual')
  axes[1].legend(fontsize=8)
  drawing.forest(
    axes[2],
    {x: statistics.geometric_mean(results.perplexity[x]) for x in OF_LOSSES},
    reference=1,
  )
  axes[2].set_xlabel('perplexity of plain text, ratio')
  caption = f"""All heads of the model learn otherwise. Left: how well the
    log-odds order {config.num_prompts} prompts by their label, interval over
    resampled prompts; grey: chance. Middle: change of the log-odds, to first
    order and as it is, for {config.num_predicted} prompts of both tasks; on the
    line they agree. Right: price on {config.num_texts} texts."""
  return [lab.Figure('changed_learning', figure, caption)]


PARTS = {'learning': lab.Part(measure, claims, figures, summary, tables=tables)}


def conclude(config: Config, results, claims) -> str:
  found = results['learning']

  def said(task, arm):
    return f'{areas(found, task, arm).value:.2f}'

  return ' '.join(
    f'Of the {task}, answers order {said(task, PLAIN)} of the pairs rightly, '
    f'{said(task, WITHOUT)} without demonstrations, {said(task, DOUBLE)} at '
    f'twice the rate, {said(task, ALONE)} if each is encoded alone, '
    f'{said(task, "second step")} with a second step.'
    for task in TASKS
  )


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
