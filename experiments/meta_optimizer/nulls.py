"""What do the metrics say of activations whose relation is known?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import lab
from experiments.lab import figures as drawing
from experiments.lab import statistics
from iclcl_jax.accounts import meta_optimizer_metrics as scoring

NUM_HEADS, NUM_ORDERED = 4, 48
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
  'SimAM-delta': lambda *x: scoring.map_update_similarity(*map(_heads, x)),
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
  """All metrics and their nulls."""

  scores: Mapping[str, Scores]
  recovery: Mapping[str, Any]  # Rec2FTP by kind, `[S]`.


@lab.float64_on_host()
@jax.default_matmul_precision('highest')
def measure(config: Any) -> Results:

  def one_seed(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_data, key_null, key_answers = jax.random.split(key, 3)
    zero, *noise = jax.random.normal(
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
    cases = _cases(zero, *noise, config.noise)
    scores = jax.lax.map(one_case, (keys, *cases))
    return Results(scores, _recover(key_answers, config))

  @lab.compile_quickly
  def all_seeds(seeds):
    return jax.lax.map(one_seed, seeds)

  return jax.device_get(all_seeds(jnp.arange(config.num_seeds)))


def _cases(zero, one, two, own, shared, size) -> tuple[Any, ...]:
  """In-context and finetuned outputs of each case, `[cases, Q, d]`."""
  everybody = jnp.broadcast_to(shared[:1], zero.shape)
  changes = jnp.stack([0 * zero, -0.5 * zero, everybody, own])
  return tuple(zero[None] + changes + size * x[None] for x in (one, two))


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
    'lift': found.lift,
    'permuted': jnp.mean(null),
  }


def estimates(results: Results) -> dict[str, dict[str, Any]]:
  """Means over repetitions: by metric, case and kind; Rec2FTP by kind."""
  found: dict[str, dict[str, Any]] = {
    name: {
      case: {
        kind: statistics.mean(x[:, index])
        for kind, x in scores._asdict().items()
      }
      for index, case in enumerate(CASES)
    }
    for name, scores in results.scores.items()
  }
  recovery = results.recovery.items()
  return found | {'Rec2FTP': {k: statistics.mean(x) for k, x in recovery}}


def claims(config: Any, results: Results) -> list[lab.Claim]:
  del config
  found = estimates(results)
  source = 'control'  # Of a metric: no paper claims it.
  recovery = lab.Claim(
    id='meta-optimizer-recovery',
    source=source,
    claim='null is 0: Rec2FTP of answers that have nothing to do with each '
    'other',
    statistic='percent, mean over repetitions; at most 5',
    estimate=found['Rec2FTP']['observed'],
    at_most=5,
  )
  return [
    lab.Claim(
      id='meta-optimizer-'
      + f'{name} {case}'.lower().replace(',', '').replace(' ', '-'),
      source=source,
      claim=f'null is 0: {name} of {words}',
      statistic='mean over queries and repetitions; within '
      f'{NEGLIGIBLE:g} of 0',
      estimate=found[name][case]['observed'],
      at_least=-NEGLIGIBLE,
      at_most=NEGLIGIBLE,
    )
    for name in METRICS
    for case, words in NULL_CASES.items()
  ] + [recovery]


def figures(config: Any, results: Results) -> list[lab.Figure]:
  caption = (
    f'Six metrics on synthetic activations of {config.num_queries} queries, '
    f'means over {config.num_seeds} repetitions with 95 % intervals (mostly '
    'smaller than the marks), next to the same metric with norm-matched random '
    'updates and with updates of other queries. Noise: unrelated updates. '
    'Forgetting: both halve the zero-shot output. Shared: one update for all '
    'queries. Own: an update of each query. Only the last is evidence about a '
    'query. For SimAM and Kendall random updates keep the zero-shot part.'
  )
  return [lab.Figure('metrics', _draw(results), caption)]


def _draw(results: Results) -> Any:
  """Observed values and their nulls, one panel for each metric."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey=True)
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
  handles = axes[0, 0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside upper center', ncols=3)
  return figure


def summary(config: Any, results: Results) -> dict[str, Any]:
  del config
  return {'nulls': estimates(results)}


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  return [
    {'metric': name, 'case': case, 'repetition': seed}
    | {kind: x[seed, index] for kind, x in scores._asdict().items()}
    for name, scores in results.scores.items()
    for index, case in enumerate(CASES)
    for seed in range(config.num_seeds)
  ]


PART = lab.Part(measure, claims, figures, summary=summary, metrics=metrics)
