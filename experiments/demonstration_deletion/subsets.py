"""What do scores say of several deletions at once, and what do rivals say?

All subsets of the demonstrations of a prompt are asked, so Shapley values are
exact. The linear datamodelling score (LDS; Park et al., arXiv:2303.14186) is
the rank correlation of the answer with the sum of the scores of what is kept,
over subsets that lack two or more demonstrations: half of these, to which no
surrogate was fitted and which no single deletion has seen.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.demonstration_deletion import prompts as prompting
from experiments.demonstration_deletion.ranks import (
  ATTRIBUTION,
  INFLUENCE,
  LABEL,
  REMOVAL,
  SOURCE,
)
from experiments.lab import figures as drawing, models, statistics, texts
from iclcl_jax import pretrained, transformer
from iclcl_jax.pretrained import attribution

ALONE, SHAPLEY = 'leave one out, exact', 'Shapley values, exact'
# In the manner of ContextCite (arXiv:2409.00729) and DETAIL (arXiv:2405.14899).
SURROGATE, RIDGE = 'linear surrogate', 'ridge on hidden states'
STRENGTH = 1.0  # Of the ridge, where the mean squared norm of a state is 1.
ADDITIVE = 0.6
MEASURES = {
  'deletion': 'Spearman correlation with deletion',
  'shapley': 'Spearman correlation with Shapley values',
  'lds': 'linear datamodelling score',
}
NAMES = 'sentiment', 'kind'  # Tasks.


class Results(NamedTuple):
  """Of one task; `P` prompts of `S` demonstrations."""

  answers: np.ndarray  # Difference of the logits, by subset. Shape `[P, 2^S]`.
  scores: Mapping[str, np.ndarray]  # Of the demonstrations. Shapes `[P, S]`.
  judged: Mapping[str, Mapping[str, np.ndarray]]  # By score and measure, `[P]`.


def subsets(size: int) -> np.ndarray:
  """Which demonstrations each subset keeps, the last one all, `[2^S, S]`."""
  return (np.arange(2**size)[:, None] >> np.arange(size)) % 2 == 1


@jax.default_matmul_precision('highest')
def measure(config: lab.Config) -> dict[str, Results]:
  """Asks all subsets of all prompts, in blocks that are resumed."""
  model, tokenizer = models.load(config)
  count, size = config.num_subset_prompts, config.num_subset_demonstrations
  kept = subsets(size)
  found = {}
  for name in NAMES:
    task = texts.TASKS[name]
    labels = [tokenizer.single_id(label) for label in task.labels]
    prompts = prompting.make(config, tokenizer, task, count, size)
    places = predicting(prompts, labels)
    arrays = jax.tree.map(jnp.asarray, (prompts, places))

    def step(model, carry, number, labels=labels, arrays=arrays):
      prompt = jax.tree.map(lambda x: x[number], arrays)
      return carry, _one_prompt(model, labels, *prompt, jnp.asarray(kept))

    _, rows = lab.scan_blocks(
      step,
      jnp.zeros(()),
      count,
      block_size=config.block_size,
      name=f'subsets_{name}',
      description=f'{name}, all subsets',
      shared=(model,),
    )
    found[name] = judge(config, prompts.positive, **rows)
  return found


def predicting(prompts: prompting.Prompts, labels: list[int]) -> np.ndarray:
  """Tokens before the labels, and the last one. Shape `[P, S + 1]`."""
  numbers = np.arange(prompts.positive.shape[1])[:, None]
  inside = prompts.segment_ids[:, None] == numbers
  inside &= np.isin(prompts.tokens, labels)[:, None]
  first_from_behind = np.argmax(inside[..., ::-1], axis=2)
  before = inside.shape[2] - 2 - first_from_behind
  return np.append(before, prompts.mask.sum(1, keepdims=True) - 1, axis=1)


def _one_prompt(model, labels, prompt, places, kept) -> dict[str, jax.Array]:
  segments, size = prompt.segment_ids, kept.shape[1]
  question = model, prompt.tokens, segments, *labels
  options = {'num_segments': size, 'mask': prompt.mask}
  parts = attribution.attribute(*question, **options)

  def answer(kept):  # What is masked counts as no position: it is deleted.
    mask = prompt.mask & ((segments < 0) | kept[segments])
    logits = pretrained.next_token_logits(model, prompt.tokens, mask=mask)
    return logits[labels[0]] - logits[labels[1]]

  def layer(x, block):
    x = transformer.apply_block(model.architecture, block, x)
    return x, x[places]

  x = pretrained.embed(model, prompt.tokens)
  _, states = transformer.scan_blocks(
    model.architecture, model.blocks, layer, x
  )
  return {
    'answers': jax.lax.map(answer, kept),
    'states': states[len(states) // 2].astype(jnp.float32),
    INFLUENCE: jnp.sum(attribution.influence(*question, **options), (0, 1)),
    ATTRIBUTION: jnp.sum(parts.contributions, axis=(0, 1)),
    REMOVAL: jnp.sum(parts.removal_effects, axis=(0, 1)),
  }


def judge(
  config: lab.Config, positive, *, answers, states, **scores
) -> Results:
  """Adds the rivals, and holds all against deletion, Shapley values, subsets.

  `answers` are `[P, 2^S]`, `states` `[P, S + 1, d]`, scores `[P, S]`.
  """
  count, size = positive.shape
  kept, sign = subsets(size), np.where(positive, 1.0, -1.0)
  rng = np.random.default_rng(config.seed)
  fewer = np.flatnonzero(kept.sum(axis=1) < size - 1)
  unseen = rng.permuted(np.tile(fewer, (count, 1)), axis=1)
  unseen = unseen[:, len(fewer) // 2 :]
  scores[LABEL] = sign
  scores[RIDGE] = ridge_influence(states, sign)
  scores[SURROGATE] = np.array(
    [
      surrogate(np.delete(kept, own, axis=0), np.delete(row, own))
      for own, row in zip(unseen, answers, strict=True)
    ]
  )
  alone = answers[:, -1:] - answers[:, 2**size - 1 - 2 ** np.arange(size)]
  scores[ALONE], scores[SHAPLEY] = alone, shapley_values(answers)

  def some(rows):
    return np.take_along_axis(rows, unseen, axis=1)

  def against(score):
    return {
      'deletion': statistics.rank_correlation(score, alone),
      'shapley': statistics.rank_correlation(score, scores[SHAPLEY]),
      'lds': statistics.rank_correlation(some(score @ kept.T), some(answers)),
    }

  return Results(answers, scores, {k: against(x) for k, x in scores.items()})


def surrogate(kept: np.ndarray, answers: np.ndarray) -> np.ndarray:
  """Least squares of answers on what is kept, and an intercept, `[S]`."""
  rows = np.insert(kept.astype(float), kept.shape[1], 1, axis=1)
  return np.linalg.lstsq(rows, answers)[0][:-1]


def shapley_values(answers: np.ndarray) -> np.ndarray:
  """Mean gain of each demonstration over all orders of joining, `[P, S]`.

  Example:
    >>> shapley_values(np.array([[0.0, 1.0, 2.0, 5.0]]))  # Of {}, 0, 1, both.
    array([[2., 3.]])
  """
  size = answers.shape[1].bit_length() - 1
  kept, number = subsets(size), np.arange(2**size)
  others = kept.sum(axis=1)
  weights = np.array([1 / (size * math.comb(size - 1, n)) for n in range(size)])
  columns = []
  for i in range(size):
    without = number[~kept[:, i]]
    gains = answers[:, without + 2**i] - answers[:, without]
    columns.append(gains @ weights[others[without]])
  return np.stack(columns, axis=1)


def ridge_influence(states: np.ndarray, sign: np.ndarray) -> np.ndarray:
  """What a ridge regression of labels on states loses without each, `[P, S]`.

  The last of the `S + 1` states is the query's.
  """
  grams = states @ states.swapaxes(1, 2)
  grams = grams / np.trace(grams, axis1=1, axis2=2)[:, None, None]
  grams, size = grams * grams.shape[1], sign.shape[1]

  def answer(chosen):
    inner = grams[:, chosen][:, :, chosen] + STRENGTH * np.eye(len(chosen))
    weights = np.linalg.solve(inner, sign[:, chosen, None])
    return np.sum(grams[:, -1, chosen, None] * weights, axis=(1, 2))

  every = np.arange(size)
  whole = answer(every)
  losses = [whole - answer(np.delete(every, i)) for i in range(size)]
  return np.stack(losses, axis=1)


def claims(config: lab.Config, results: dict[str, Results]) -> lab.Claims:
  for task, found in results.items():
    judged = found.judged
    ours, ridge = (judged[x]['deletion'] for x in (INFLUENCE, RIDGE))
    where = f'(task {task!r})'
    yield from lab.statements(
      'deletion-',
      f"""
      additive-{task} [{SOURCE}] sums of what single deletions take, exactly,
        rank subsets {where} | LDS
      influence-additive-{task} [{SOURCE}] sums of influence rank subsets
        {where} | LDS
      detail-{task} [ours, in the manner of DETAIL, arXiv:2405.14899: a ridge on
        the states of the middle layer] influence through a ridge regression
        ranks the effects of deletion better than influence on the dual models
        {where} | Spearman correlation less that of influence, paired by prompt
      """,
      {
        f'additive-{task}': lab.at_least(ADDITIVE, judged[ALONE]['lds']),
        f'influence-additive-{task}': lab.at_least(
          ADDITIVE, judged[INFLUENCE]['lds']
        ),
        f'detail-{task}': lab.at_least(0, ridge - ours),
      },
      runs='prompts',
    )


def rows(results: dict[str, Results]) -> list[dict[str, Any]]:
  return [
    {'task': task, 'score': name}
    | {key: statistics.mean(x) for key, x in judged.items()}
    | {
      f'{key} less influence': statistics.mean(x - found.judged[INFLUENCE][key])
      for key, x in judged.items()
    }
    for task, found in results.items()
    for name, judged in found.judged.items()
  ]


def summary(config: lab.Config, results: dict[str, Results]) -> dict[str, Any]:
  return {'subsets': rows(results)}


tables = summary


def figures(
  config: lab.Config, results: dict[str, Results]
) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 3, figsize=(13, 4), sharey=True)
  looks: tuple[dict[str, Any], ...] = (
    {'fmt': 'o', 'color': drawing.BLUE, 'offset': -0.15},
    {'fmt': 's', 'color': drawing.ORANGE, 'mfc': 'white', 'offset': 0.15},
  )
  for axis, (key, title) in zip(axes, MEASURES.items(), strict=True):
    for look, (task, found) in zip(looks, results.items(), strict=True):
      means = {k: statistics.mean(x[key]) for k, x in found.judged.items()}
      drawing.forest(axis, means, label=task, **look)
    axis.axvline(0, color=drawing.GREY, ls='--', lw=1)
    axis.set_xlabel(title)
  drawing.legend(axes[0], 2)
  caption = f"""How well scores of single demonstrations rank single deletions,
    Shapley values and the answers to subsets that lack two or more (which
    Shapley values alone have seen), within a prompt: means over
    {config.num_subset_prompts} prompts of each task,
    {config.num_subset_demonstrations} demonstrations each, with 95 %
    t-intervals. Labels are tied: theirs cannot correlate to 1."""
  return [lab.Figure('subsets', figure, caption)]


def sentence(config: lab.Config, results: dict[str, Results]) -> str:
  def all_of(name, key):
    means = (np.mean(x.judged[name][key]) for x in results.values())
    return ' and '.join(f'{mean:.2f}' for mean in means)

  return f"""Of several deletions at once ({' and '.join(results)}) sums of
    influence rank the answers to {all_of(INFLUENCE, 'lds')}, sums of exact
    single deletions to {all_of(ALONE, 'lds')}, a linear surrogate to
    {all_of(SURROGATE, 'lds')}. A ridge regression on hidden states ranks single
    deletions to {all_of(RIDGE, 'deletion')}, influence the same ones to
    {all_of(INFLUENCE, 'deletion')}."""
