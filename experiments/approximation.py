r"""How well random features imitate softmax attention, against their number R.

Attention with random features and its dual model agree to rounding for any
features. How well the features imitate the softmax kernel is another question
and another number, measured here: errors of the attention matrix and of the
output against R, for eight feature maps, at controlled norms and at the
trained weights of the papers' layer::

  python -m experiments.approximation --workdir=out/approximation

It takes about a minute and a half of CPU time, on two cores.
Expect, for the papers' map (positive features, gaussian directions) with 16
tokens of size 12, and 95 % intervals in `summary.json`:

=======  =========  =========  ==============  ============  =============
inputs   MSE slope  MAE slope  Pearson         output error  dual residual
=======  =========  =========  ==============  ============  =============
sd 0.25  -0.99      -0.50      0.97            1.6 %         1e-15
sd 0.5   -0.88      -0.46      0.97            6.9 %         1e-15
sd 1     -0.34      -0.22      0.79            49 %          1e-15
sd 1.5   -0.17      -0.11      0.57            80 %          1e-15
sd 2     -0.10      -0.07      0.40            96 %          1e-15
trained  -0.09      -0.10      0.36            57 %          1e-15
=======  =========  =========  ==============  ============  =============

(sd: of the entries of queries and keys; slopes of the attention matrix's error
against R on log-log axes; the last three columns at R = 1200, the errors being
those against softmax.) So the papers' claim that the error falls with R holds
everywhere, and that it becomes low, or that the matrices look alike, at small
norms only. The trained layer is no approximation of softmax attention: with
the directions it was trained with, its held-out loss is 0.12 of that of
predicting zero, with fresh ones 0.19, with exact softmax 1.2.

Draws are the unit of every interval (95 %, bootstrap); the draws of the trained
condition are held-out prompts of 10 layers, and there the layer is the unit.
Maps are compared at equal numbers of directions and of features: hyperbolic and
trigonometric maps make two features of a direction. A map with negative weights
has no mean error, since its normaliser may vanish: maps are compared by
geometric means and medians.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 3 centre and right, Figs. 4, 6, 7, 9.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments import approximation_claims as judging
from experiments import approximation_inputs as inputs
from experiments import approximation_measure as measuring
from experiments import approximation_report as report
from experiments import approximation_summary as summarising
from experiments import approximation_theory as theory
from experiments import harness, pretraining
from experiments.approximation_measure import METHODS
from iclcl_jax import _validate

PAPER_MAP = METHODS[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_draws: int = harness.option(60, 'draws of inputs and directions')
  num_seeds: int = harness.option(
    10, 'trained layers; num_draws is a multiple of it'
  )
  num_features: tuple[int, ...] = harness.option(
    (120, 240, 480, 600, 960, 1200, 2400, 4800),
    'even, increasing numbers R of directions, and of features',
  )
  heatmap_features: tuple[int, ...] = harness.option(
    (120, 480, 1200, 4800), 'those with heatmaps'
  )
  reference_features: int = harness.option(
    1200, 'the one at which the layer is trained and entries are compared'
  )
  standard_deviations: tuple[float, ...] = harness.option(
    (0.25, 0.5, 1.0, 1.5, 2.0), 'of the entries of queries and keys'
  )
  num_demonstrations: int = harness.option(15, 'demonstrations N of a prompt')
  second_num_demonstrations: int = harness.option(31, 'N of the second set')
  num_epochs: int = harness.option(100, 'epochs of pretraining')
  learning_rate: float = harness.option(0.003, 'of pretraining')

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    for name in (
      'num_draws',
      'num_seeds',
      'num_demonstrations',
      'second_num_demonstrations',
      'num_epochs',
    ):
      _validate.check_count(name, getattr(self, name))
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    if self.num_draws % self.num_seeds:
      raise ValueError(
        f'num_draws is {self.num_draws} with num_seeds={self.num_seeds}; '
        'expected a multiple of it, so that every layer has as many prompts.'
      )
    if self.num_demonstrations == self.second_num_demonstrations:
      raise ValueError(
        f'second_num_demonstrations is {self.second_num_demonstrations}, like '
        'num_demonstrations; expected another count.'
      )
    self._check_features()
    if not self.standard_deviations:
      raise ValueError('standard_deviations is empty; expected some, like 0.5.')
    for deviation in self.standard_deviations:
      _validate.check_scalar('standard_deviations', deviation, minimum=1e-3)

  def _check_features(self):
    sizes = self.num_features
    for size in sizes:
      _validate.check_count('num_features', size, minimum=2)
    if len(sizes) < 3 or list(sizes) != sorted(set(sizes)):
      raise ValueError(
        f'num_features is {sizes}; expected three or more increasing counts, '
        'to fit a slope.'
      )
    if any(size % 2 for size in sizes):
      raise ValueError(
        f'num_features is {sizes}; expected even counts: some maps make two '
        'features of a direction.'
      )
    shown = self.heatmap_features
    if len(shown) < 2 or list(shown) != sorted(set(shown)):
      raise ValueError(
        f'heatmap_features is {shown}; expected two or more increasing counts.'
      )
    if not {*shown, self.reference_features} <= set(sizes):
      raise ValueError(
        f'heatmap_features is {self.heatmap_features} and reference_features '
        f'{self.reference_features}; expected members of num_features, {sizes}.'
      )


def run(config: Config, workdir: str) -> Mapping[str, Any]:
  """Measures, judges, draws; writes all results into `workdir`.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary.

  Raises:
    ValueError: if the workdir cannot be written or holds another config.
  """
  start = time.perf_counter()
  path = harness.open_workdir(config, workdir)
  keys = jax.random.split(jax.random.key(config.seed), 6)
  first, layers = _conditions(config, keys[0], config.num_demonstrations)
  second, _ = _conditions(config, keys[1], config.second_num_demonstrations)
  directions = measuring.draw_all_directions(
    keys[2],
    METHODS,
    config.num_features,
    config.num_draws,
    pretraining.TOKEN_DIM,
  )
  data = summarising.Measurements(
    measuring.measure(directions, first, METHODS, config.num_features)
  )
  second_directions = measuring.draw_all_directions(
    keys[3],
    [PAPER_MAP],
    _second_features(config),
    config.num_draws,
    pretraining.TOKEN_DIM,
  )
  second_data = summarising.Measurements(
    measuring.measure(
      second_directions, second, [PAPER_MAP], _second_features(config)
    )
  )
  own = measuring.compare(PAPER_MAP, layers.directions, [layers.condition])[0]
  residuals = {
    method.name: theory.algebra_residual(
      method, directions[method.projection][config.reference_features][0], first
    )
    for method in METHODS
  }
  summary = _summarise(config, data, second_data, layers, own.errors, residuals)
  report.save_figures(path, config, data, second_data, layers.losses, summary)
  harness.write_metrics(path, report.metrics([data, second_data]))
  summary['seconds'] = time.perf_counter() - start
  summary['figures'] = report.captions(config, summary)
  summary['conclusion'] = report.conclusion(config, summary)
  print(report.tables(config, summary))
  return harness.write_summary(path, summary)


def _second_features(config: Config) -> list[int]:
  return sorted({*config.heatmap_features, config.reference_features})


def _conditions(config: Config, key, num_demonstrations):
  """Controlled norms, then the trained layer."""
  key_controlled, key_trained = jax.random.split(key)
  layers = inputs.trained(
    key_trained,
    num_demonstrations,
    num_draws=config.num_draws,
    num_seeds=config.num_seeds,
    num_features=config.reference_features,
    num_epochs=config.num_epochs,
    learning_rate=config.learning_rate,
  )
  controlled = inputs.controlled(
    key_controlled,
    config.standard_deviations,
    config.num_draws,
    num_demonstrations + 1,
  )
  return [*controlled, layers.condition], layers


def _summarise(
  config: Config, data, second_data, layers, own_errors, residuals
) -> dict[str, Any]:
  """All numbers that decide the claims."""
  size = config.reference_features
  ratios = {m.name: summarising.closed_form_ratios(data, m) for m in METHODS}
  sources = {
    'v1 Fig. 3 centre and right; v2 appendix': judging.falling_claims(
      data, PAPER_MAP, config.num_features
    ),
    'v1 Figs. 4, 6 and 7': judging.heatmap_claims(
      data, PAPER_MAP, size, config.heatmap_features
    ),
    'v1 Fig. 9': judging.heatmap_claims(
      second_data, PAPER_MAP, size, config.heatmap_features
    ),
    'control, not in the papers': judging.trained_claims(layers.losses),
    'closed-form variance of each map': judging.closed_form_claims(
      ratios, data
    ),
  }
  claims = [
    judging.identified(claim, source)
    for source, group in sources.items()
    for claim in group
  ]
  errors = {m.name: summarising.errors_at(data, m, size) for m in METHODS}
  return {
    'num_draws': config.num_draws,
    'num_trained_layers': config.num_seeds,
    'num_features': config.num_features,
    'num_tokens': [
      config.num_demonstrations + 1,
      config.second_num_demonstrations + 1,
    ],
    'token_size': pretraining.TOKEN_DIM,
    'interval': '95 % bootstrap percentile interval over draws; at trained '
    'weights over layers',
    'units': report.UNITS,
    'algebra_residual_float64': max(map(max, residuals.values())),
    'algebra_residual_float64_by_map': residuals,
    'approximation_error': {
      name: error['output_relative']
      for name, error in errors[PAPER_MAP.name].items()
    },
    f'errors_at_{size}_directions': errors,
    'squared_norm_of_sum_over_sqrt_dim': summarising.norms(data),
    'slope_of_log_error_per_log_direction': {
      m.name: summarising.slopes(data, m) for m in METHODS
    },
    'measured_over_closed_form': ratios,
    'map_comparisons': summarising.comparisons(
      data, PAPER_MAP, config.num_features
    ),
    'trained_layer': summarising.trained_layer(layers, own_errors, size),
    'claims': claims,
  }


if __name__ == '__main__':
  harness.run_binary(Config, run)
