"""Does what attribution says of demonstrations rank what deleting them does?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.demonstration_deletion import prompts as prompting
from experiments.lab import figures as drawing, statistics
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution

SOURCE = 'sanity study of attribution'
IDENTITY = 1e-5  # Of a float32 sum, relative to its absolute terms.
AGREEMENT = 0.8
ATTRIBUTION = 'direct logit attribution'
REMOVAL = 'closed-form removal'
LABEL = 'label'
MODEL_FREE = LABEL, 'label times recency', 'recency', 'length', 'random'
# Baselines that attribution has to beat, for each question.
RIVALS = {'signed': LABEL, 'size': 'recency'}
TITLES = {'signed': 'effect, with sign', 'size': 'size of the effect'}
PANELS = {
  'contribution': 'direct logit attribution',
  'removal_effect': 'closed-form removal',
  'hidden': 'hidden, positions kept',
}


class Effects(NamedTuple):
  """What was predicted and measured, of the logits' difference."""

  # Logit of the positive label less that of the negative one, behind the whole
  # prompt. Shape `[P]`.
  difference: Any
  identity_gap: Any  # Relative error of the sum of its parts. Shape `[P]`.
  contribution: Any  # Of a demonstration through all heads. Shape `[P, S]`.
  removal_effect: Any  # Likewise. Shape `[P, S]`.
  attention: Any  # Weight of a demonstration, mean over heads. Shape `[P, S]`.
  loss_drop: Any  # Share of the dual loss drop, mean over heads, `[P, S]`.
  removed: Any  # What is lost by a forward pass without it. Shape `[P, S]`.
  hidden: Any  # By one where no token may attend to it. Shape `[P, S]`.


class Ranks(NamedTuple):
  """Rank correlations with the effect of removal, prompt by prompt `[P]`."""

  spearman: np.ndarray  # Spearman's.
  kendall: np.ndarray  # Kendall's.
  spearman_hidden: np.ndarray  # Spearman's with the effect of hiding.


class Results(NamedTuple):
  """What was measured."""

  prompts: prompting.Prompts
  effects: Effects  # Of their demonstrations.
  ranks: Mapping[str, Mapping[str, Ranks]]  # By question and method.


@jax.default_matmul_precision('highest')
def measure(config: Any) -> Results:
  """Attributes and deletes in all prompts, in blocks that are resumed."""
  model, tokenizer = pretrained.load(
    config.model_path or pretrained.smollm2.weights_path()
  )
  labels = [tokenizer.single_id(label) for label in prompting.LABELS]
  prompts = prompting.make(config, tokenizer)
  arrays = jax.tree.map(jnp.asarray, prompts)

  def step(model, carry, number):
    prompt = jax.tree.map(lambda rows: rows[number], arrays)
    return carry, one_prompt(model, labels, prompt)._asdict()

  _, found = lab.scan_blocks(
    step,
    jnp.zeros(()),
    config.num_prompts,
    block_size=config.block_size,
    name='prompts',
    shared=(model,),
  )
  effects = Effects(**found)
  return Results(prompts, effects, rank(config, prompts, effects))


def one_prompt(
  model: pretrained.LanguageModel, labels: list[int], prompt: Any
) -> Effects:
  """Measures one prompt: `Prompts` of JAX arrays, without the axis `P`."""
  size = prompt.positive.shape[0]
  segments, mask = prompt.segment_ids, prompt.mask
  options = {'num_segments': size, 'mask': mask}
  readings = attribution.read_heads(model, prompt.tokens, segments, **options)
  parts = attribution.direct_logit_attribution(model, readings, *labels)
  gradients = attribution.demonstration_gradients(
    model, prompt.tokens, segments, **options
  )
  removed = attribution.logit_differences_without(
    model, prompt.tokens, segments, *labels, **options
  )
  hidden = jax.lax.map(
    lambda number: attribution.logit_difference(
      model, prompt.tokens, *labels, mask=mask, excluded=segments == number
    ),
    jnp.arange(size, dtype=segments.dtype),
  )
  terms = (
    *(parts.contributions, parts.rest, parts.embedding),
    *(parts.biases, parts.final_bias),
  )
  scale = sum(jnp.sum(jnp.abs(term)) for term in terms)
  return Effects(
    difference=parts.logit_difference,
    identity_gap=jnp.abs(parts.total - parts.logit_difference) / scale,
    contribution=jnp.sum(parts.contributions, axis=(0, 1)),
    removal_effect=jnp.sum(parts.removal_effects, axis=(0, 1)),
    attention=jnp.mean(jnp.exp(readings.log_shares), axis=(0, 1))[:-1],
    loss_drop=jnp.mean(gradients.drop_shares, axis=(0, 1)),
    removed=parts.logit_difference - removed,
    hidden=parts.logit_difference - hidden,
  )


def rank(
  config: Any, prompts: prompting.Prompts, effects: Effects
) -> dict[str, dict[str, Ranks]]:
  """Correlates what each method says with the effect and with its size."""
  sign = np.where(prompts.positive, 1.0, -1.0)
  recency = np.arange(1.0, sign.shape[1] + 1) + np.zeros_like(sign)
  blind = {
    'attention weight': effects.attention,
    'dual loss drop': effects.loss_drop,
    'recency': recency,
    'length': prompts.lengths,
    'random': np.random.default_rng(config.seed + 1).random(sign.shape),
  }
  told = {ATTRIBUTION: effects.contribution, REMOVAL: effects.removal_effect}
  labelled = {LABEL: sign, 'label times recency': sign * recency}

  def against(scores, removed, hidden):
    return {
      name: Ranks(
        statistics.rank_correlation(score, removed),
        statistics.kendall(score, removed),
        statistics.rank_correlation(score, hidden),
      )
      for name, score in scores.items()
    }

  sizes = {name: np.abs(score) for name, score in told.items()}
  removed, hidden = effects.removed, effects.hidden
  return {
    'signed': against(told | labelled | blind, removed, hidden),
    'size': against(sizes | blind, np.abs(removed), np.abs(hidden)),
  }


def agreement(results: Results) -> lab.Estimate:
  """Of hiding a demonstration with deleting it."""
  effects = results.effects
  return statistics.mean(
    statistics.rank_correlation(effects.hidden, effects.removed)
  )


def towards_own_label(results: Results) -> lab.Estimate:
  """How far a demonstration moves the difference towards its label."""
  sign = np.where(results.prompts.positive, 1.0, -1.0)
  return statistics.mean(np.mean(sign * results.effects.removed, axis=1))


def claims(config: Any, results: Results) -> list[lab.Claim]:

  def mean_claim(name, claim, statistic, samples, at_least):
    return lab.Claim(
      id=f'deletion-{name}',
      source=SOURCE,
      claim=claim,
      statistic=f'{statistic}, mean over prompts with its 95% t-interval; at '
      f'least {at_least:g}',
      estimate=statistics.mean(samples),
      at_least=at_least,
    )

  found = [
    lab.Claim(
      id='deletion-identity',
      source=SOURCE,
      claim='the parts of the logit difference sum to it',
      statistic='largest error of the sum over prompts, relative to the sum of '
      f'the absolute parts, float32; at most {IDENTITY:g}',
      estimate=lab.exactly(np.max(results.effects.identity_gap)),
      at_most=IDENTITY,
    )
  ]
  what = {
    'signed': 'the effect of deleting it on the logit difference',
    'size': 'the size of that effect',
  }
  for question, methods in results.ranks.items():
    rival = RIVALS[question]
    against = methods[rival].spearman
    for short, method in (('attribution', ATTRIBUTION), ('removal', REMOVAL)):
      ours = methods[method].spearman
      found += [
        mean_claim(
          f'{short}-{question}',
          f'{method} of a demonstration ranks {what[question]}',
          'Spearman correlation within a prompt',
          ours,
          0,
        ),
        mean_claim(
          f'{short}-{question}-better',
          f'{method} ranks {what[question]} better than {rival} does',
          f'Spearman correlation less that of {rival}, paired by prompt; '
          f'{rival} is taken in the direction that suits it',
          ours - np.sign(np.mean(against)) * against,
          0,
        ),
      ]
  effects = results.effects
  return [
    *found,
    mean_claim(
      'hidden',
      'hiding the tokens of a demonstration does what deleting them does',
      'Spearman correlation of the two effects within a prompt',
      statistics.rank_correlation(effects.hidden, effects.removed),
      AGREEMENT,
    ),
  ]


def summary(config: Any, results: Results) -> dict[str, Any]:
  effects = results.effects
  positive = effects.difference > 0
  return {
    'num_prompts': config.num_prompts,
    'num_demonstrations': config.num_demonstrations,
    'identity_gap_float32': np.max(effects.identity_gap),
    'mean_rank_correlation': {
      question: {
        name: {key: statistics.mean(x) for key, x in found._asdict().items()}
        for name, found in methods.items()
      }
      for question, methods in results.ranks.items()
    },
    'hidden_against_removed_spearman': agreement(results),
    'pearson_pooled': _pearson(effects),
    'effect_towards_own_label': towards_own_label(results),
    'mean_absolute_effect_of_removal': np.mean(np.abs(effects.removed)),
    'mean_absolute_logit_difference': np.mean(np.abs(effects.difference)),
    'accuracy_of_model': np.mean(positive == results.prompts.query_positive),
    'fraction_answered_positive': np.mean(positive),
  }


def _pearson(effects: Effects) -> dict[str, float]:
  """Correlation over all demonstrations of all prompts, with removal."""
  removed = effects.removed.ravel()
  return {
    name: np.corrcoef(getattr(effects, name).ravel(), removed)[0, 1]
    for name in PANELS
  }


def tables(config: Any, results: Results) -> dict[str, list[dict[str, Any]]]:
  rows = []
  for question, methods in results.ranks.items():
    for name, found in methods.items():
      row: dict[str, Any] = {'effect': question, 'method': name}
      for key, samples in found._asdict().items():
        value, low, high = statistics.mean(samples)
        row |= {key: value, f'{key}_low': low, f'{key}_high': high}
      rows.append(row)
  return {'correlations': rows}


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  """One row for each demonstration of each prompt."""
  prompts, effects = results.prompts, results.effects
  names = 'contribution', 'removal_effect', 'attention', 'loss_drop'
  return [
    {
      'prompt': number,
      'demonstration': place,
      'positive': prompts.positive[number, place],
      'num_tokens': prompts.lengths[number, place],
      'logit_difference': effects.difference[number],
    }
    | {
      name: getattr(effects, name)[number, place]
      for name in (*names, 'removed', 'hidden')
    }
    for number, place in np.ndindex(*prompts.positive.shape)
  ]


def figures(config: Any, results: Results) -> list[lab.Figure]:
  prompts = (
    f'{config.num_prompts} prompts of {config.num_demonstrations} '
    'demonstrations'
  )
  pearson = ', '.join(f'{x:.2f}' for x in _pearson(results.effects).values())
  return [
    lab.Figure(
      'correlations',
      _draw_ranks(results),
      'Rank correlation, within each prompt, of what a method says of the '
      'demonstrations and what deleting each of them does to the logit '
      'difference in a new forward pass: with its sign (left) and its size '
      f'alone (right). {prompts}; grey circles: prompts, their area says how '
      'many have that correlation; mean over prompts with its 95% t-interval. '
      'Filled circles are read from the model, open squares need no model. A '
      'method that says the same of all demonstrations counts as 0.',
    ),
    lab.Figure(
      'scatter',
      _draw_scatter(results),
      'What deleting a demonstration takes from the logit difference (positive '
      'less negative label), against direct logit attribution, against the '
      'closed-form removal from the dual states of all heads, and against '
      'hiding its tokens at unchanged positions. One mark for each '
      f'demonstration of {prompts}; dashed: equality. Scales of the axes '
      f'differ. Pooled Pearson correlations: {pearson}.',
    ),
  ]


def _draw_ranks(results: Results) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), sharex=True)
  for axis, (question, methods) in zip(
    axes, results.ranks.items(), strict=True
  ):
    rows = {name: statistics.mean(x.spearman) for name, x in methods.items()}
    for place, found in enumerate(methods.values()):
      values, counts = np.unique(found.spearman.round(1), return_counts=True)
      areas, ring = 700 * counts / len(found.spearman), {'facecolors': 'none'}
      places = np.full(len(values), place)
      axis.scatter(values, places, s=areas, edgecolors=drawing.GREY, **ring)
    bars = {'capsize': 4, 'lw': 2}
    drawing.forest(axis, rows, reference=0, ms=8, zorder=3, **bars)
    for place, (name, mean) in enumerate(rows.items()):
      if name in MODEL_FREE:
        width = [mean.value - mean.low], [mean.high - mean.value]
        look = {'color': drawing.ORANGE, 'mfc': 'white', 'ms': 9, 'zorder': 4}
        axis.errorbar(mean.value, place, xerr=width, fmt='s', **look, **bars)
    axis.set_title(TITLES[question])
    axis.set_xticks([-1, -0.5, 0, 0.5, 1])
    axis.set_xlabel('Spearman correlation with deletion')
  handles = [
    plt.Line2D([], [], color=color, marker=marker, ls='', mfc=fill, label=text)
    for color, marker, fill, text in (
      (drawing.BLUE, 'o', drawing.BLUE, 'mean, 95% interval: needs the model'),
      (drawing.ORANGE, 's', 'white', 'mean, 95% interval: needs no model'),
      (drawing.GREY, 'o', 'none', 'prompts (area: how many)'),
    )
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=3)
  return figure


def _draw_scatter(results: Results) -> Any:
  figure, axes = drawing.subplots(1, 3, figsize=(13, 4.6), sharey=True)
  effects, positive = results.effects, results.prompts.positive
  for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
    for chosen, marker, color, label in (
      (positive, 'o', drawing.BLUE, 'positive demonstration'),
      (~positive, '^', drawing.ORANGE, 'negative demonstration'),
    ):
      look = {
        's': 16,
        'marker': marker,
        'facecolors': 'none',
        'linewidths': 0.8,
      }
      x, y = getattr(effects, name)[chosen], effects.removed[chosen]
      axis.scatter(x, y, edgecolors=color, label=label, **look)
    axis.axline((0, 0), slope=1, color=drawing.BLACK, ls='--', lw=1)
    axis.axhline(0, color=drawing.GREY, lw=0.8, zorder=0)
    axis.axvline(0, color=drawing.GREY, lw=0.8, zorder=0)
    axis.set_title(title)
    axis.set_xlabel('predicted (logits)' if name != 'hidden' else 'logits')
  axes[0].set_ylabel('lost by deletion (logits)')
  drawing.legend(axes[0], 2)
  return figure


def sentence(config: Any, results: Results) -> str:
  """One paragraph, from the numbers."""
  means = {
    question: {name: statistics.mean(x.spearman) for name, x in methods.items()}
    for question, methods in results.ranks.items()
  }
  signed, size = means['signed'], means['size']
  best = max(signed, key=lambda name: abs(signed[name].value))
  right = np.mean(
    (results.effects.difference > 0) == results.prompts.query_positive
  )
  return (
    f'In {config.num_prompts} prompts, the Spearman correlation with the '
    'effect of deleting a demonstration is '
    f'{signed[ATTRIBUTION]:+.2f} for direct logit attribution and '
    f'{signed[REMOVAL]:+.2f} for the closed-form removal, '
    f'{signed[LABEL]:+.2f} for its label alone and '
    f'{signed["random"]:+.2f} for a random order; the largest in size is '
    f'that of {best}. A demonstration moves the logit difference by '
    f'{towards_own_label(results):+.2f} towards its own label (negative: away '
    f'from it). For the size of the effect it is {size[ATTRIBUTION]:+.2f} and '
    f'{size[REMOVAL]:+.2f}, {size["recency"]:+.2f} for recency and '
    f'{size["length"]:+.2f} for length. Hiding a demonstration agrees with '
    f'deleting it to {agreement(results).value:.2f}. The model answers '
    f'{right:.0%} of the queries as the critic did. '
    'The attribution is exact as a sum; it follows the direct paths from the '
    'heads at the last token only, and what a demonstration does to the tokens '
    'after it is not among them.'
  )
