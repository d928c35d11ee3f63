"""Implicit finetuning: what its metrics say of known answers.

The metrics that compare learning in context with finetuning are applied to
synthetic activations whose relation is known: unrelated noise, a common loss of
the zero-shot output, an update that all queries share, an update of each
query's own::

  python -m experiments.meta_optimizer --workdir=out/meta_optimizer

It takes about 15 s of CPU time. Expect (10 repetitions) SimAOU .00 on noise and
.74 on a common loss, SimAOU normalised .03 on noise, SimAM .92 and Kendall .74
on unrelated updates, and Rec2FTP 82 % for answers that have nothing to do with
each other.

No model is trained: this says what the metrics can show, not what a language
model does.

References:
  Dai et al., arXiv:2212.10559; Deutch et al., arXiv:2311.07772.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import lab
from experiments.lab import figures as drawing, statistics
from iclcl_jax.accounts import meta_optimizer_metrics as scoring

NUM_HEADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(10, 'repetitions', minimum=5, tiny=5)
  num_queries: int = lab.option(32, 'queries', minimum=8, tiny=8)
  width: int = lab.option(
    256, 'width of an output', minimum=8, multiple_of=NUM_HEADS, tiny=64
  )
  num_draws: int = lab.count(8, 'draws of a null', tiny=2)
  noise: float = lab.option(
    0.3, 'size of unrelated noise over that of the baseline', minimum=0.01
  )


NUM_ORDERED = 48
NEGLIGIBLE = 0.02
CASES = 'noise', 'forgetting', 'shared', 'own'
NULL_CASES = {  # In which a metric of learning should be 0.
  'noise': 'unrelated updates (noise)',
  'forgetting': 'a common loss of the zero-shot output (forgetting)',
}


def _heads(x):
  return x.reshape(NUM_HEADS, -1)


METRICS = {  # Of the outputs in context, finetuned, and zero-shot.
  'SimAOU': scoring.update_similarity,
  'SimAOU, normalised': scoring.normalised_update_similarity,
  'SimAOU, partial': scoring.partial_update_similarity,
  'SimAM': lambda one, two, _: scoring.map_similarity(_heads(one), _heads(two)),
  'SimAM-delta': lambda *x: scoring.map_similarity(*map(_heads, x)),
  # Its cost is quadratic: as many tokens as a prompt of a few examples has.
  'Kendall': lambda one, two, _: scoring.kendall(
    one[:NUM_ORDERED], two[:NUM_ORDERED]
  ),
}


class Scores(NamedTuple):
  """A metric, mean over queries. Shapes `[S, cases]`."""

  observed: Any  # On the activations.
  random: Any  # With random updates of the same norms.
  permuted: Any  # With the updates of other queries.


class Results(NamedTuple):
  scores: Mapping[str, Scores]
  recovery: Mapping[str, Any]  # Rec2FTP by kind, `[S]`.


@lab.float64_on_host()
def measure(config: Config) -> Results:

  def one_seed(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_data, key_null, key_answers = jax.random.split(key, 3)
    zero, one, two, own, shared = jax.random.normal(
      key_data, (5, config.num_queries, config.width)
    )

    def one_case(case):
      key, *pair = case
      keys = jax.random.split(key, len(METRICS))
      return {
        name: _observe(k, similarity, (*pair, zero), config.num_draws)
        for (name, similarity), k in zip(METRICS.items(), keys, strict=True)
      }

    keys = jax.random.split(key_null, len(CASES))
    everybody = jnp.broadcast_to(shared[:1], zero.shape)
    changes = jnp.stack([0 * zero, -0.5 * zero, everybody, own])
    # In-context and finetuned outputs of each case, `[cases, Q, d]`.
    pairs = (zero[None] + changes + config.noise * x[None] for x in (one, two))
    scores = jax.lax.map(one_case, (keys, *pairs))
    return Results(scores, _recover(key_answers, config))

  return lab.compute_each(one_seed, jnp.arange(config.num_seeds))


def _observe(key, similarity, outputs, num_draws) -> Scores:
  keys = jax.random.split(key)
  nulls = [
    jnp.mean(null(k, similarity, *outputs, num_draws=num_draws))
    for null, k in zip(
      (scoring.random_null, scoring.permuted_null), keys, strict=True
    )
  ]
  return Scores(jnp.mean(jax.vmap(similarity)(*outputs)), *nulls)


def _recover(key, config) -> dict[str, Any]:
  """Rec2FTP where all three answer right independently: 30, 50 and 80 %."""
  key_answers, key_null = jax.random.split(key)
  chances = jnp.array([[0.3], [0.5], [0.8]])
  shape = 3, 20 * config.num_queries
  zero, tuned, shown = jax.random.uniform(key_answers, shape) < chances
  found = scoring.recovery(shown, tuned, zero)
  null = scoring.recovery_null(
    key_null, shown, tuned, zero, num_draws=config.num_draws
  )
  return {
    'observed': found.percent,
    'chance': found.chance,
    'lift': found.percent - found.chance,
    'permuted': jnp.mean(null),
  }


def estimates(results: Results) -> dict[str, dict[str, Any]]:
  """Means over repetitions: by metric, case and kind; Rec2FTP by kind."""
  found: dict[str, dict[str, Any]] = {
    name: {
      case: {k: statistics.mean(x[:, i]) for k, x in scores._asdict().items()}
      for i, case in enumerate(CASES)
    }
    for name, scores in results.scores.items()
  }
  recovery = results.recovery.items()
  return found | {'Rec2FTP': {k: statistics.mean(x) for k, x in recovery}}


def claims(config: Config, results: Results) -> lab.Claims:
  """All controls of a metric: no paper claims them."""
  found = estimates(results)
  for name, (case, words) in itertools.product(METRICS, NULL_CASES.items()):
    key = f'{name} {case}'.lower().replace(',', '').replace(' ', '-')
    yield from lab.statements(
      'meta-optimizer-',
      f"""{key} [control] null is 0: {name} of {words} | mean over queries and
      repetitions""",
      {key: lab.within(-NEGLIGIBLE, NEGLIGIBLE, found[name][case]['observed'])},
    )
  yield from lab.statements(
    'meta-optimizer-',
    """recovery [control] null is 0: Rec2FTP of answers that have nothing to do
    with each other | percent, mean over repetitions""",
    {'recovery': lab.at_most(5, found['Rec2FTP']['observed'])},
  )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(
    2, 3, figsize=(11, 6), sharex=True, sharey=True
  )
  looks = ('o', drawing.BLACK), ('^', drawing.BLUE), ('s', drawing.ORANGE)
  found = estimates(results)
  for axis, name in zip(axes.flat, METRICS, strict=True):
    for index, (fmt, colour) in enumerate(looks):
      kind = Scores._fields[index]
      drawing.forest(
        axis,
        {case: found[name][case][kind] for case in CASES},
        offset=0.22 * (index - 1),
        reference=0,
        **{'fmt': fmt, 'color': colour, 'mfc': 'white', 'label': kind},
      )
    axis.set_title(name)
  for axis in axes[1]:
    axis.set_xlabel('mean over queries')
  drawing.legend(axes[0, 0], 3, 'outside upper center')
  caption = f"""Six metrics on synthetic activations of {config.num_queries}
    queries, means over {config.num_seeds} repetitions with 95 % intervals
    (mostly smaller than the marks), beside norm-matched random updates and
    those of other queries. Noise: unrelated updates. Forgetting: both halve the
    zero-shot output. Shared: one update for all queries. Own: an update of each
    query, the only evidence about one. For SimAM and Kendall random updates
    keep the zero-shot part."""
  return [lab.Figure('metrics', figure, caption)]


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {'nulls': estimates(results)}


def metrics(config: Config, results: Results) -> lab.Metrics:
  axes = {'repetition': range(config.num_seeds), 'case': CASES}
  for name, scores in results.scores.items():
    yield from lab.tidy({'metric': name}, scores._asdict(), **axes)


PARTS = {'nulls': lab.Part(measure, claims, figures, summary, metrics=metrics)}


def conclude(config, results, claims) -> str:
  """What to remember of a run: what the metrics say of known answers."""
  found = estimates(results['nulls'])
  recovery = found['Rec2FTP']

  def mean(name, case, kind='observed'):
    return found[name][case][kind].value

  return f"""On unrelated updates SimAOU is {mean('SimAOU', 'noise'):.3f}, its
    normalised form {mean('SimAOU, normalised', 'noise'):.3f}; when both sides
    merely forget half of the zero-shot output SimAOU is
    {mean('SimAOU', 'forgetting'):.2f}, the partial cosine
    {mean('SimAOU, partial', 'forgetting'):.3f}. SimAM is
    {mean('SimAM', 'noise'):.2f} on unrelated updates, SimAM-delta
    {mean('SimAM-delta', 'noise'):.3f}, Kendall {mean('Kendall', 'noise'):.2f}.
    Answers that have nothing to do with each other have a Rec2FTP of
    {recovery['observed'].value:.0f} %, a chance level of
    {recovery['chance'].value:.0f} %. An update that all queries share gives
    SimAOU {mean('SimAOU', 'shared'):.2f}, and
    {mean('SimAOU', 'shared', 'permuted'):.2f} with permuted queries: the random
    null does not catch that, the permuted one does. Neither catches forgetting
    (SimAOU with permuted queries:
    {mean('SimAOU', 'forgetting', 'permuted'):.2f}), which only the partial
    cosine removes."""


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
