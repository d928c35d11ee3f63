"""How well does each account learn, and does a trained layer learn like it?

Losses are mean squared errors over that of predicting 0 on the same prompts.
Ratios are geometric means over seeds, whose prompts both sides share.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.accounts import layers
from experiments.accounts.layers import MEMORIES
from experiments.lab import Config, figures as drawing, statistics
from iclcl_jax.accounts import linear_regression_gd as account
from iclcl_jax.types import Array, Float

CLOSE = 0.95, 1.05  # Ratios that count as the same.
ALIGNED = 0.99
KINDS = TUNED, TRAINED = 0, 1
NAMES = 'tuned', 'trained'
MEANS = {'mean': statistics.mean, 'geometric mean': statistics.geometric_mean}
OSWALD = 'von Oswald et al., arXiv:2212.07677'
ORDERS = (  # Better and worse learner, as is claimed.
  ('two-head softmax', 'softmax'),
  ('delta rule', 'linear attention'),
  ('gated delta rule', 'delta rule'),
  ('delta rule (momentum)', 'delta rule'),
  ('momentum attention', 'softmax'),
)


class Alike(NamedTuple):
  """Trained layers beside tuned ones at the length of training, by seed."""

  mirrored: Array  # Beside mirror images, if those predict more alike.
  ratio: Float[Array, ' S']  # Of losses.
  difference: Float[Array, ' S']  # Preds diff over the mean prediction.
  cosine: Float[Array, ' S']  # Model cos.

  @property
  def num_apart(self) -> int:
    return len(self.ratio) - _num_within(self.ratio, *CLOSE)


class Learner(NamedTuple):
  """Gates and losses of one memory: tuned and, if it is a layer, trained."""

  gates: Float[Array, 'K S G']
  loss: Float[Array, 'K S L']  # By number of demonstrations.
  here: Float[Array, 'K S']  # At that of training.
  scaled: Float[Array, 'K S A']  # By scale of the inputs.
  alike: Alike | None


Results = Mapping[str, Learner]


def measure(config: Config) -> Results:
  """Tunes, trains and measures all memories, two programs at a time."""
  names = [name for name in MEMORIES if name in config.learners]
  prompts = jax.block_until_ready(layers.draw_all(config))
  found = lab.in_threads(  # The slow ones first.
    lambda name: _measure_one(config, name, prompts), reversed(names)
  )
  return dict(zip(names, reversed(found), strict=True))


def _measure_one(config: Config, name: str, prompts: layers.Prompts) -> Learner:
  """Fits one memory, and measures it: one program."""
  memory = MEMORIES[name]

  @lab.compile_quickly
  def everything(prompts):
    fitted = layers.fit(memory, prompts.training, prompts.keys, config)
    return jax.lax.map(
      lambda a: _evaluate(config, memory, *a),
      (fitted, prompts.testing, prompts.scaled),
    )

  # Every learner starts from the same random projections.
  keys = jax.random.clone(prompts.keys)
  found = jax.device_get(everything(prompts._replace(keys=keys)))
  gates, loss, here, scaled = (np.swapaxes(x, 0, 1) for x in found[:4])
  return Learner(gates, loss, here, scaled, found.alike)


def _evaluate(config: Config, memory, fitted, testing, scaled) -> Learner:
  """Measures the tuned and the trained layer of one seed."""
  lengths = jnp.asarray(config.lengths)
  length = jnp.asarray([config.num_demonstrations])

  def loss(layer, prompts, lengths):
    guess = jax.vmap(lambda t: layers.answers(memory, layer, t, lengths))(
      prompts.tokens
    )
    zero = jnp.mean(prompts.target**2)
    return jnp.mean((guess - prompts.target) ** 2, axis=0) / zero

  def one(layer):
    at_scale = jax.lax.map(lambda p: loss(layer, p, length)[0], scaled)
    return loss(layer, testing, lengths), at_scale

  curve, at_scale = jax.lax.map(one, fitted)
  gates = memory.numbers(fitted.gates.T)
  alike = None
  if memory.is_layer:
    # Prompts of the length of training, scale 1.
    short = jax.tree.map(lambda x: x[config.scales.index(1.0)], scaled)
    alike = _compare(config, memory, fitted, short)
  here = curve[:, config.lengths.index(config.num_demonstrations)]
  return Learner(jnp.stack(gates, axis=-1), curve, here, at_scale, alike)


def _compare(config: Config, memory, fitted, prompts) -> Alike:
  """Compares the trained layer with the tuned one and its mirror image."""
  here = jnp.asarray([config.num_demonstrations])

  def behaviour(layer, tokens):
    def answer(rows):
      return layers.answers(memory, layer, rows, here)

    slope = jax.grad(lambda rows: answer(rows)[0])(tokens)
    return answer(tokens), slope[-1, : config.d_x]

  tuned = jax.tree.map(lambda w: w[TUNED], fitted)
  trained = jax.tree.map(lambda w: w[TRAINED], fitted)
  mirror = layers.mirrored(tuned)
  three = jax.tree.map(lambda *w: jnp.stack(w), tuned, mirror, trained)
  guess, slopes = jax.lax.map(
    lambda layer: jax.vmap(lambda t: behaviour(layer, t))(prompts.tokens), three
  )
  gaps = jnp.mean(jnp.linalg.norm(guess[2:] - guess[:2], axis=2), axis=1)
  # A layer that is its own mirror image is not mirrored, whatever rounding.
  nearer = (gaps[1] < 0.99 * gaps[0]).astype(int)
  losses = jnp.mean((guess - prompts.target[None]) ** 2, axis=(1, 2))
  return Alike(
    mirrored=nearer,
    ratio=losses[2] / losses[nearer],
    difference=gaps[nearer] / jnp.mean(jnp.abs(guess[nearer])),
    cosine=account.model_cosine(slopes[2], slopes[nearer]),
  )


def alike(results: Results) -> dict[str, Alike]:
  """Trained layers beside tuned ones, of the memories that are layers."""
  return {k: row.alike for k, row in results.items() if row.alike is not None}


def _num_within(values, at_least: float, at_most: float) -> int:
  values = np.asarray(values, np.float64)
  return int(np.sum((at_least <= values) & (values <= at_most)))


def identifier(name: str) -> str:
  return name.replace(' ', '-').replace(',', '')


def claims(config: Config, results: Results) -> list[lab.Claim]:
  trained_alike = [
    claim
    for name, found in alike(results).items()
    for claim in _trained_is_tuned(config, name, found)
  ]
  return [*trained_alike, *_orders(results), *_elsewhere(config, results)]


def _claims(
  text: str, found: Mapping[str, lab.Found], by: str = 'geometric mean'
) -> list[lab.Claim]:
  """Claims on averages, and on the seeds, of which one can move them."""
  claims = lab.statements(
    'accounts-',
    text,
    {k: x._replace(value=MEANS[by](x.value)) for k, x in found.items()},
  )

  def more(claim):
    values, *limits = found[claim.id.removeprefix('accounts-')]
    return lab.one_line(f"""{claim.statistic}; {by}; median
      {np.median(values):.3g}, {_num_within(values, *limits)} of {len(values)}
      seeds in that range""")

  return [dataclasses.replace(x, statistic=more(x)) for x in claims]


def _trained_is_tuned(config: Config, name: str, found: Alike):
  slug, account = identifier(name), MEMORIES[name].account
  ratio, cosine = f'trained-{slug}', f'aligned-{slug}'
  return _claims(
    f"""{ratio} [{account}] {name}: a trained layer learns as well as its
    predicted inner step, and no better | loss of trained over that of tuned (or
    its mirror image) at {config.num_demonstrations} demonstrations""",
    {ratio: lab.within(*CLOSE, found.ratio)},
  ) + _claims(
    f"""{cosine} [{account}] {name}: a trained layer depends on the query as its
    predicted inner step does | cosine of the derivatives of both answers in the
    query (Model cos)""",
    {cosine: lab.at_least(ALIGNED, found.cosine)},
    by='mean',
  )


def _orders(results: Results) -> list[lab.Claim]:
  tuned = {name: row.here[TUNED] for name, row in results.items()}
  trained = {k: row.here[TRAINED] for k, row in results.items() if row.alike}
  found = {
    identifier(f'{better}-beats-{worse}'): lab.at_most(
      1.0, trained[better] / trained[worse]
    )
    for better, worse in ORDERS
    if {better, worse} <= results.keys()
  }
  if {'softmax', 'linear attention'} <= results.keys():
    ratio = trained['softmax'] / tuned['linear attention']
    found['one-head-is-not-gd'] = lab.at_least(1.0, ratio)
  if {'GD (2 steps)', 'GD++ (2 steps)'} <= results.keys():
    ratio = tuned['GD++ (2 steps)'] / tuned['GD (2 steps)']
    found['gd-plus-plus-beats-gd'] = lab.at_most(1.0, ratio)
  losses = 'ratio of losses of trained layers at the training length'
  carried = '(on language), carried over to this task'
  rows = _claims(
    f"""
    two-head-softmax-beats-softmax [{OSWALD}, appendix (softmax self-attention)]
      two softmax heads learn better than one | {losses}
    delta-rule-beats-linear-attention [Schlag et al., arXiv:2102.11174, section
      4] the delta rule learns better than linear attention | {losses}
    gated-delta-rule-beats-delta-rule [Yang et al., arXiv:2412.06464 {carried}]
      a gate improves the delta rule | {losses}
    delta-rule-(momentum)-beats-delta-rule [Behrouz et al., arXiv:2501.00663
      {carried}] momentum improves the delta rule | {losses}
    momentum-attention-beats-softmax [Dai et al., arXiv:2212.10559, Table 6
      {carried}] momentum attention learns better than softmax attention |
      {losses}
    one-head-is-not-gd [{OSWALD}] one softmax head falls short of one step of
      gradient descent | ratio of losses of the trained head and the tuned step
    gd-plus-plus-beats-gd [{OSWALD}, section 4] two steps of GD++ learn better
      than two of gradient descent | ratio of losses, tuned
    """,
    found,
  )
  mesa = tuned.pop('least squares (mesa)', None)
  if mesa is None or not tuned:
    return rows
  ratios = {k: statistics.paired_ratio(x, mesa) for k, x in tuned.items()}
  best = min(ratios, key=lambda name: ratios[name].value)
  return rows + lab.statements(
    'accounts-',
    f"""least-squares-is-best [von Oswald et al., arXiv:2309.05858] ridge
    regression in the context learns best of all | loss of the next best,
    {best}, over its loss, tuned""",
    {'least-squares-is-best': lab.at_least(1.0, ratios[best])},
  )


def _elsewhere(config: Config, results: Results) -> list[lab.Claim]:
  largest, longest = config.scales[-1], config.lengths[-1]
  text, found = '', {}
  if 'linear attention' in results:
    scaled = results['linear attention'].scaled[..., -1]
    ratio = scaled[TRAINED] / scaled[TUNED]
    found['linear-scale'] = lab.within(*CLOSE, ratio)
  if 'delta rule' in results:
    losses = results['delta rule'].scaled[TRAINED, :, -1]
    found['delta-scale'] = lab.at_least(1.0, losses)
  for name in alike(results):
    ratio = results[name].loss[TRAINED, :, -1] / results[name].here[TRAINED]
    key = identifier(f'length-{name}')
    found[key] = lab.at_most(1.0, ratio)
    text += f"""
    {key} [length generalisation, a question of this comparison] {name}: a
      trained layer gains from more demonstrations than in training | loss at
      {longest} over that at {config.num_demonstrations} demonstrations"""
  return _claims(
    f"""
    linear-scale [{OSWALD}, Fig. 2 (out of distribution)] trained linear
      self-attention follows one step of gradient descent to other input scales
      | loss of trained over that of tuned with inputs times {largest:g}
    delta-scale [stability of the delta rule, step size times |k|^2 <= 2 (Yang
      et al., arXiv:2406.06484)] a trained delta rule does not carry over to
      larger inputs | its loss over that of predicting 0, inputs times
      {largest:g}
    """.rstrip()
    + text,
    found,
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'learners': [_line(*row) for row in results.items()],
    'closed_form_loss': _closed_form(config),
    'lengths': config.lengths,
    'scales': config.scales,
    'loss_by_length': _means(results, 'loss'),
    'loss_by_scale': _means(results, 'scaled'),
    'loss_unit': 'mean squared error over that of predicting 0',
  }


def _line(name: str, learner: Learner) -> dict[str, Any]:
  gates = learner.gates[TUNED].mean(axis=0)
  line: dict[str, Any] = {
    'learner': name,
    'account': MEMORIES[name].account,
    'tuned': {
      gate.name: float(value)
      for gate, value in zip(MEMORIES[name].gates, gates, strict=True)
    },
    'loss_tuned': statistics.mean(learner.here[TUNED]),
    'loss_tuned_longest': float(learner.loss[TUNED, :, -1].mean()),
  }
  found = learner.alike
  if found is None:
    return line
  return line | {
    'loss_trained': statistics.mean(learner.here[TRAINED]),
    'trained_over_tuned': statistics.geometric_mean(found.ratio),
    'ratios': found.ratio,
    'ratio_median': float(np.median(found.ratio)),
    'num_apart': found.num_apart,
    'model_cos': statistics.mean(found.cosine),
    'preds_diff_relative': statistics.mean(found.difference),
    'num_mirrored': int(found.mirrored.sum()),
  }


def _means(results: Results, name: str) -> dict[str, Any]:
  return {
    learner: dict(zip(NAMES, getattr(row, name).mean(axis=1), strict=False))
    for learner, row in results.items()
  }


def _closed_form(config: Config) -> list[float]:
  """Expected loss of one step, tuned at the training length, by length."""

  def tasks(size):
    return account.LinearTasks(
      d_x=config.d_x,
      num_demonstrations=size,
      moments=account.Moments(1 / 3, 1 / 5),
      noise_variance=config.noise**2,
    )

  rate = account.optimal_learning_rate(tasks(config.num_demonstrations))
  zero = config.d_x / 6
  losses = (account.expected_loss(tasks(n), rate) for n in config.lengths)
  return [float(loss / zero) for loss in losses]


def metrics(config: Config, results: Results) -> lab.Metrics:
  seeds = range(config.num_seeds)
  for name, learner in results.items():
    for values, axis in (
      (learner.loss, {'num_demonstrations': config.lengths}),
      (learner.scaled, {'scale': config.scales}),
    ):
      for kind, losses in zip(NAMES, values, strict=False):
        yield from lab.tidy(
          {'learner': name, 'kind': kind}, {'loss': losses}, seed=seeds, **axis
        )


# Every learner has a marker and, within a colour, a line style.
LOOKS = {
  'softmax': (drawing.BLACK, '-', 'o'),
  'momentum attention': (drawing.GREY, '--', 'x'),
  'softmax regression': (drawing.PINK, '-', 'p'),
  'gated decay': (drawing.SKY, '--', 'v'),
  'linear attention': (drawing.BLUE, '-', 's'),
  'two-head softmax': (drawing.BLACK, '-.', 'h'),
  'GD (2 steps)': (drawing.BLUE, '--', 'd'),
  'delta rule': (drawing.ORANGE, '-', '^'),
  'gated delta rule': (drawing.YELLOW, '--', '<'),
  'delta rule (momentum)': (drawing.ORANGE, ':', '+'),
  'GD++ (2 steps)': (drawing.BLUE, ':', 'D'),
  'SGD (4 epochs)': (drawing.PINK, '--', '*'),
  'least squares (mesa)': (drawing.GREEN, '-', 'P'),
}
SHOWN = (
  'softmax',
  'two-head softmax',
  'gated decay',
  'linear attention',
  'delta rule',
  'least squares (mesa)',
)
FRAME = 3e-4, 8.0
TICKS = -20, -5, -1, 0, 1, 5, 20, 100  # Excess losses, in percent.


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(2, 2, figsize=(12, 9.4))
  learners, trained, scale, length = axes.ravel()
  shown = {name: results[name] for name in SHOWN if name in results}
  _curves(learners, config.lengths, results, 'loss', [TUNED])
  _ratios(trained, alike(results))
  _curves(scale, config.scales, shown, 'scaled', KINDS)
  _curves(length, config.lengths, shown, 'loss', KINDS)
  for axis in (learners, length):
    drawing.size_axis(axis, config.lengths)
    axis.axvline(config.num_demonstrations, color=drawing.GREY, linestyle=':')
    axis.set_xlabel('number of demonstrations N (log scale)')
  scale.set_xticks(config.scales, [f'{a:g}' for a in config.scales])
  scale.axvline(1, color=drawing.GREY, linestyle=':')
  scale.set_xlabel('scale of the inputs at test time')
  learners.set_title('(a) predicted inner learners, tuned')
  trained.set_title('(b) trained layers against them', pad=30)
  scale.set_title('(c) input scale: tuned (lines), trained (markers)')
  length.set_title('(d) length: tuned (lines), trained (markers)')
  drawing.legend(learners, 4)
  caption = f"""In-context linear regression by every account, on the same
    prompts (d = {config.d_x}, inputs from U(-1, 1), label noise
    {config.noise:g}); losses over that of predicting 0. (a) The predicted inner
    learners, tuned at {config.num_demonstrations} demonstrations (dotted line);
    curves that coincide cover each other. (b) Layers whose projections are
    trained: excess of their loss over that of the tuned inner learner, a dot
    for each seed and the geometric mean; linear within 1 % (grey), logarithmic
    beyond. Right, how many seeds lie outside 5 % (dashed), and the mean cosine
    of the derivatives of both answers in the query. A softmax layer may find
    the mirror image - queries and values with the other sign - as good for
    symmetric inputs; then the cosine is to that. (c) Inputs scaled at test
    time, (d) more demonstrations than in training: lines are tuned, markers
    trained. {config.num_seeds} seeds, each with {config.num_test_prompts} test
    prompts of its own, and 95 % intervals. Means of losses are geometric;
    losses outside the frames are left out."""
  return [lab.Figure('accounts', figure, caption)]


def _curves(axis, places, results: Results, field: str, kinds) -> None:
  for name, learner in results.items():
    colour, line, marker = LOOKS[name]
    own = {'color': colour, 'linestyle': line, 'marker': marker}
    tuned, *trained = (
      [statistics.geometric_mean(x) for x in getattr(learner, field)[kind].T]
      for kind in kinds
    )
    lines = own | {'label': name} | ({'marker': ''} if trained else {})
    drawing.band(axis, places, tuned, **lines)
    for estimates in trained:
      bars = own | {'linestyle': 'none', 'mfc': 'white', 'capsize': 3}
      drawing.bars(axis, places, estimates, **bars)
  axis.axhline(1, color=drawing.BLACK, linewidth=0.8)
  axis.set(yscale='log', ylim=FRAME, ylabel='loss / loss of predicting 0')


def _ratios(axis, rows: Mapping[str, Alike]) -> None:
  """Excess loss of each trained layer over its tuned inner learner."""
  means = {
    name: lab.Estimate(
      *(100 * (x - 1) for x in statistics.geometric_mean(found.ratio))
    )
    for name, found in rows.items()
  }
  drawing.forest(axis, means, offset=-0.2, mfc='white', capsize=4)
  for place, found in enumerate(rows.values()):
    excess = 100 * (found.ratio - 1)
    heights = np.full(len(excess), place + 0.2)
    axis.plot(excess, heights, 'o', color=drawing.GREY, ms=4, alpha=0.7)
    apart = f'{found.num_apart} of {len(excess)}'
    for column, entry in ((1.1, apart), (1.28, f'{found.cosine.mean():.3f}')):
      _beside(axis, column, place, entry)
  _beside(axis, 1.1, -1.1, 'seeds\noutside')
  _beside(axis, 1.28, -1.1, 'mean\ncosine')
  axis.set_xscale('symlog', linthresh=1, linscale=0.6)
  axis.set_xticks(TICKS, [f'{tick:g}' for tick in TICKS])
  axis.set_xticks([], minor=True)
  low, high = axis.get_xlim()  # No seed is left out.
  axis.set_xlim(min(low, TICKS[0]), max(high, TICKS[-1]))
  axis.axvspan(-1, 1, color=drawing.GREY, alpha=0.2, linewidth=0)
  axis.axvline(0, color=drawing.BLACK, linewidth=0.8)
  for edge in CLOSE:
    axis.axvline(100 * (edge - 1), color=drawing.GREY, ls='--', lw=1)
  axis.set_xlabel('excess loss of the trained layer (%)')


def _beside(axis, column: float, place: float, entry: str) -> None:
  """Writes into a column right of the axis."""
  frame = axis.get_yaxis_transform()
  axis.text(column, place, entry, transform=frame, ha='center', va='center')
