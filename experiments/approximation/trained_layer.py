"""Is the trained layer softmax attention in disguise?"""

from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.approximation import estimates, inputs
from experiments.lab import Config, figures as drawing


class Results(NamedTuple):
  layers: inputs.TrainedLayers
  own: estimates.Record  # Beside softmax, through their own directions.
  conditions: list[estimates.Condition]  # All inputs, the trained ones last.


def measure(config: Config) -> Results:
  data = estimates.measured(config)
  layers = data.layers
  (own,) = estimates.compare(
    estimates.PAPER_MAP, layers.directions, [layers.condition]
  )
  return Results(layers, own, list(data.first.conditions.values()))


def claims(config: Config, results: Results) -> lab.Claims:
  losses = results.layers.losses
  names = 'fresh_directions', 'exact_softmax'
  ratio = 'held-out loss over that with the trained directions'
  return estimates.statements(
    'trained',
    '\n'.join(
      f"""{name} [control, not in the papers] trained layer works as well with
      {name.replace('_', ' ')} | {ratio}, geometric mean over layers"""
      for name in names
    ),
    {
      name: lab.at_most(
        1.1,
        estimates.geometric_mean(losses[name] / losses['trained_directions']),
      )
      for name in names
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  size = config.reference_features
  return {
    'trained_layer': {
      'held_out_loss_ratio': {
        name: estimates.geometric_mean(losses)
        for name, losses in results.layers.losses.items()
      },
      f'errors_with_trained_directions_at_{size}': results.own.means(),
    }
  }


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, (left, right) = drawing.subplots(1, 2, figsize=(13.5, 5.2))
  looks = list(zip(drawing.COLOURS, drawing.MARKERS, strict=True))
  for i, condition in enumerate(results.conditions):
    colour, marker = looks[i % len(looks)]
    squares = np.sort(condition.squared_norms().ravel())
    left.plot(squares, np.linspace(0, 1, squares.size), color=colour, lw=1.6)
    level = 0.12 + 0.14 * i
    x = np.quantile(squares, level)
    left.plot(x, level, marker, color=colour)
    left.annotate(f' {condition.name}', (x, level), color=colour, va='top')
  left.set_xscale('log')
  left.axvspan(4, left.get_xlim()[1], color='0.9', zorder=0)
  left.set(
    xlabel='v = |q + k|²/√d of a pair; relative variance is (exp(v) − 1)/R',
    ylabel='fraction of pairs below',
    title='Training drives |q + k| out of the regime of random features\n'
    'grey: a kernel value needs over 5000 directions for an error of 10 %',
  )
  losses = results.layers.losses
  values = np.array(list(losses.values()))
  right.plot(range(3), values, '-', color='0.75', lw=0.8)
  for i, row in enumerate(values):
    colour, marker = looks[i]
    right.plot(np.full(row.size, i), row, marker, color=colour, ms=5)
    mean = np.exp(np.mean(np.log(row)))
    right.text(i + 0.08, mean, f'{mean:.2f}', va='center')
  right.axhline(1, color='black', lw=0.8, ls=':')
  right.text(-0.35, 1.05, 'predicting zero', fontsize=10)
  right.set_xticks(range(3), [name.replace('_', ' ') for name in losses])
  right.set_xlim(-0.4, 2.5)
  right.set(yscale='log', ylabel='held-out loss / loss of predicting zero')
  right.set_title(
    f'{values.shape[1]} trained layers (joined by lines; number: geometric '
    'mean)\nsame weights, another kernel'
  )
  caption = """Norms at which the trained layers work, and their held-out loss
    with the directions of training, with fresh ones, and with exact softmax:
    the trained layer is no approximation of softmax attention."""
  return [lab.Figure('trained_layer', figure, caption)]
