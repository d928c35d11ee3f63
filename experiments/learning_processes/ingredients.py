"""Which of SimSiam's ingredients parts its first step from attention's?"""

from collections.abc import Mapping
from typing import Any

import jax

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.learning_processes import processes, prompts
from experiments.learning_processes.duals import CLOSE
from iclcl_jax import losses

INGREDIENTS = NONE, COSINE, PREDICTOR, TARGETS, SIMSIAM = (
  'none: inner product, values as targets',
  'cosine instead of inner product',
  'random predictor',
  'own outputs as targets',
  'all three: SimSiam',
)
Angles = Mapping[str, Any]  # Degrees by ingredient. Shapes `[S, P]`.


def measure(config: Config) -> dict[str, Angles]:
  return prompts.of_every(config, _angles)


def _angles(prompt: prompts.Prompt) -> Angles:
  """Angles with attention of first steps from the same random weights."""
  keys, values = prompt.views.keys, prompt.values[:-1]
  _, second = prompt.views.pair()
  simsiam = processes.PROCESSES['SimSiam']
  plain = processes.through('weights')
  cases = {
    NONE: (losses.contrastive, plain, None),
    COSINE: (losses.cosine, plain, None),
    PREDICTOR: (losses.contrastive, simsiam.online, None),
    TARGETS: (losses.contrastive, plain, simsiam.target),
    SIMSIAM: (losses.cosine, simsiam.online, simsiam.target),
  }

  def first_step(loss, online, target):
    def objective(encoder):
      targets = values if target is None else target(encoder, second)
      return loss(online(encoder, keys), targets)

    return -jax.grad(objective)(prompt.start).weights

  return {
    name: prompts.angle(first_step(*case), values.T @ keys)
    for name, case in cases.items()
  }


def claims(config: Config, results: Mapping[str, Angles]) -> lab.Claims:
  for data, angles in results.items():
    yield from prompts.statements(
      data,
      f"""
      cosine_parts_from_attention [{prompts.COMPARISON}] the normalised cosine
        alone changes attention's first step | angle in degrees
      SimSiam_parts_from_attention [{prompts.COMPARISON}] SimSiam's first step
        has nothing of attention's | angle in degrees
      """,
      {
        'cosine_parts_from_attention': lab.at_least(CLOSE, angles[COSINE]),
        'SimSiam_parts_from_attention': lab.at_least(80, angles[SIMSIAM]),
      },
    )


def figures(config: Config, results: Mapping[str, Angles]) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(10, 4.6))
  colours = drawing.BLUE, drawing.ORANGE
  for index, (data, angles) in enumerate(results.items()):
    look: Any = {'fmt': drawing.MARKERS[index], 'color': colours[index]}
    drawing.forest(
      axis,
      {k: statistics.mean(prompts.by_seed(angles[k])) for k in INGREDIENTS},
      offset=0.24 * index - 0.12,
      label=f'demonstrations: {data}',
      **look,
    )
  axis.axvline(90, color=drawing.GREY, linewidth=1, linestyle=':')
  axis.set_xticks(range(0, 91, 15))
  axis.set_xlabel("first step and attention's, angle in degrees")
  axis.set_title("What is added to attention's loss")
  drawing.legend(axis, 2, handlelength=3.2)
  caption = f"""Angle of the first step of the weights with attention's, from
    the same random weights, with one of SimSiam's ingredients at a time and
    with all of them (90 degrees: nothing in common).
    {prompts.about(config, 'bars')}"""
  return [lab.Figure('ingredients', figure, caption)]
