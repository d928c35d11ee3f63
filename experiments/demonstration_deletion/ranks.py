"""Which score ranks demonstrations as deleting them does?"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.demonstration_deletion import prompts as prompting
from experiments.lab import figures as drawing, models, statistics, texts
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution

SOURCE = 'sanity study of attribution'
IDENTITY = 1e-5  # Of a float32 sum, relative to its absolute terms.
AGREEMENT = 0.8
INFLUENCE = 'influence'
HIDE_FORM = 'influence, hide form'
ATTRIBUTION = 'direct logit attribution'
REMOVAL = 'closed-form removal'
LABEL = 'label'
MODEL_FREE = LABEL, 'label times recency', 'recency', 'length', 'random'
# What is asked of influence: correlations within prompts of few and of more
# demonstrations, and the share of right signs.
GOALS = 0.6, 0.7
SIGNS = 0.8
# Of scores that read the model, and of those without it.
LOOKS: tuple[dict[str, Any], ...] = (
  {'fmt': 'o', 'color': drawing.BLUE},
  {'fmt': 's', 'color': drawing.ORANGE, 'mfc': 'white'},
)


class Effects(NamedTuple):
  """What was predicted and measured, of the logits' difference."""

  difference: Any  # Logit of the positive label less that of the other, `[P]`.
  identity_gap: Any  # Relative error of the sum of its parts. Shape `[P]`.
  influence: Any  # Of a demonstration on all heads and tokens. Shape `[P, S]`.
  contribution: Any  # Of a demonstration through all heads. Shape `[P, S]`.
  removal_effect: Any  # Likewise. Shape `[P, S]`.
  attention: Any  # Weight of a demonstration, mean over heads. Shape `[P, S]`.
  removed: Any  # What is lost if it is deleted. Shape `[P, S]`.
  # In the first setting alone; a capped kernel has no loss drop.
  loss_drop: Any = None  # Share of the dual loss drop, mean over heads.
  hidden: Any = None  # What is lost if no token may attend to it.
  influence_hidden: Any = None  # Its influence on that.


class Setting(NamedTuple):
  task: str
  size: int  # Demonstrations of a prompt, `S`.
  prompts: prompting.Prompts
  effects: Effects


Results = list[Setting]  # The first one is described in detail.


@jax.default_matmul_precision('highest')
def measure(config: lab.Config) -> Results:
  """Attributes and deletes in all prompts, in blocks that are resumed."""
  model, tokenizer = models.load(config)
  tasks = {name: texts.TASKS[name] for name in ('sentiment', 'kind')}
  labels = {
    name: [tokenizer.single_id(label) for label in task.labels]
    for name, task in tasks.items()
  }
  settings = []
  for task, number in zip(
    tasks, (config.num_prompts, config.num_other_prompts), strict=True
  ):
    for size in (config.num_demonstrations, config.more_demonstrations):
      arguments = tasks[task], number, size
      prompts = prompting.make(config, tokenizer, *arguments)
      settings.append((task, size, prompts))
  return [_measure(config, model, labels[x[0]], *x) for x in settings]


def _measure(config, model, labels, task, size, prompts) -> Setting:
  is_first = task == 'sentiment' and size == config.num_demonstrations
  arrays = jax.tree.map(jnp.asarray, prompts)
  inside = prompts.segment_ids[None] == np.arange(size)[:, None, None]
  behind = (np.cumsum(inside, axis=2) > 0) & ~inside & prompts.mask[None]
  num_rows = int(prompts.tokens.shape[1] + behind.sum(axis=(0, 2)).max())

  def step(model, carry, number):
    prompt = jax.tree.map(lambda rows: rows[number], arrays)
    found = one_prompt(model, labels, prompt, num_rows, is_first)
    return carry, {k: v for k, v in found._asdict().items() if v is not None}

  _, found = lab.scan_blocks(
    step,
    jnp.zeros(()),
    len(prompts.tokens),
    block_size=config.block_size,
    name='prompts' if is_first else f'{task}_{size}',
    description=f'{task}, {size} demonstrations',
    shared=(model,),
  )
  return Setting(task, size, prompts, Effects(**found))


def one_prompt(
  model: pretrained.LanguageModel,
  labels: list[int],
  prompt: Any,
  num_rows: int,
  is_first: bool,
) -> Effects:
  """Measures one prompt: `Prompts` of JAX arrays, without the axis `P`."""
  segments, size = prompt.segment_ids, prompt.positive.shape[0]
  options = {'num_segments': size, 'mask': prompt.mask}
  question = model, prompt.tokens, segments, *labels
  readings = attribution.read_heads(*question[:3], **options)
  parts = attribution.direct_logit_attribution(model, readings, *labels)

  def influence(removal):
    terms = attribution.influence(*question, removal=removal, **options)
    return jnp.sum(terms, axis=(0, 1))

  def effects(removal):
    return attribution.effects_of_removal(
      *question, removal=removal, num_rows=num_rows, **options
    )

  terms = (
    *(parts.contributions, parts.rest, parts.embedding),
    *(parts.biases, parts.final_bias),
  )
  scale = sum(jnp.sum(jnp.abs(term)) for term in terms)
  found = Effects(
    difference=parts.logit_difference,
    identity_gap=jnp.abs(parts.total - parts.logit_difference) / scale,
    influence=influence('delete'),
    contribution=jnp.sum(parts.contributions, axis=(0, 1)),
    removal_effect=jnp.sum(parts.removal_effects, axis=(0, 1)),
    attention=jnp.mean(jnp.exp(readings.log_shares), axis=(0, 1))[:-1],
    removed=effects('delete'),
  )
  if not is_first:
    return found
  drop: Any = None
  if model.architecture.score_cap is None:  # Others have no norm.
    gradients = attribution.demonstration_gradients(*question[:3], **options)
    drop = jnp.mean(gradients.drop_shares, axis=(0, 1))
  return found._replace(
    loss_drop=drop, hidden=effects('hide'), influence_hidden=influence('hide')
  )


def scores(
  config: lab.Config, prompts: prompting.Prompts, effects: Effects
) -> dict[str, np.ndarray]:
  """What each method says of the demonstrations. Shapes `[P, S]`."""
  sign = np.where(prompts.positive, 1.0, -1.0)
  recency = np.arange(1.0, sign.shape[1] + 1) + np.zeros_like(sign)
  found = {
    INFLUENCE: effects.influence,
    HIDE_FORM: effects.influence_hidden,
    ATTRIBUTION: effects.contribution,
    REMOVAL: effects.removal_effect,
    LABEL: sign,
    'label times recency': sign * recency,
    'attention weight': effects.attention,
    'dual loss drop': effects.loss_drop,
    'recency': recency,
    'length': prompts.lengths,
    'random': np.random.default_rng(config.seed + 1).random(sign.shape),
  }
  return {name: score for name, score in found.items() if score is not None}


class Judged(NamedTuple):
  """How well a score says what deletion does, prompt by prompt `[P]`."""

  spearman: np.ndarray
  sign: np.ndarray  # Share of demonstrations whose sign is right.
  largest: np.ndarray  # Whether it finds the largest effect.
  pearson: float  # Over all demonstrations, each prompt centred.
  # With hiding, in the first setting.
  spearman_hide: np.ndarray | None


def judge(config: lab.Config, setting: Setting) -> dict[str, Judged]:
  removed, hidden = setting.effects.removed, setting.effects.hidden
  centred = removed - removed.mean(axis=1, keepdims=True)
  largest = np.argmax(np.abs(removed), axis=1)

  def one(score):
    own = score - score.mean(axis=1, keepdims=True)
    return Judged(
      statistics.rank_correlation(score, removed),
      np.mean(np.sign(score) == np.sign(removed), axis=1),
      np.argmax(np.abs(score), axis=1) == largest,
      float(statistics.correlation(own.ravel(), centred.ravel())),
      None if hidden is None else statistics.rank_correlation(score, hidden),
    )

  named = scores(config, setting.prompts, setting.effects)
  return {name: one(np.asarray(score)) for name, score in named.items()}


def agreement(results: Results) -> lab.Estimate:
  effects = results[0].effects
  alike = statistics.rank_correlation(effects.hidden, effects.removed)
  return statistics.mean(alike)


def towards_own_label(results: Results) -> lab.Estimate:
  """How far a demonstration moves the difference towards its label."""
  sign = np.where(results[0].prompts.positive, 1.0, -1.0)
  return statistics.mean(np.mean(sign * results[0].effects.removed, axis=1))


def claims(config: lab.Config, results: Results) -> lab.Claims:
  effects = results[0].effects
  statements = functools.partial(lab.statements, 'deletion-', runs='prompts')
  spearman = 'Spearman correlation within a prompt'
  yield from statements(
    f"""identity [{SOURCE}] the parts of the logit difference sum to it |
    largest error of the sum over prompts, relative to the sum of the absolute
    parts, float32""",
    {'identity': lab.at_most(IDENTITY, np.max(effects.identity_gap))},
  )
  judged = judge(config, results[0])
  against = judged[LABEL].spearman
  for name, method in (('attribution', ATTRIBUTION), ('removal', REMOVAL)):
    own = judged[method].spearman
    better = own - np.sign(np.mean(against)) * against
    yield from statements(
      f"""
      {name} [{SOURCE}] {method} of a demonstration ranks the effects of
        deletion | {spearman}
      {name}-better [{SOURCE}] {method} ranks them better than the label does |
        Spearman correlation less that of the label, turned to suit it, paired
        by prompt
      """,
      {name: lab.at_least(0, own), f'{name}-better': lab.at_least(0, better)},
    )
  for goal, setting in zip(GOALS * 2, results, strict=True):
    judged = judge(config, setting)
    ours = judged[INFLUENCE]
    rivals = [x for x in judged if x not in (INFLUENCE, HIDE_FORM)]
    rival = max(rivals, key=lambda x: abs(np.mean(judged[x].spearman)))
    against = judged[rival].spearman
    better = ours.spearman - against * np.sign(np.mean(against))
    name = f'influence-{setting.task}-{setting.size}'
    where = f'({setting.size} demonstrations, task {setting.task!r})'
    yield from statements(
      f"""
      {name} [{SOURCE}] influence ranks the effects of deletion {where} |
        {spearman}
      {name}-better [{SOURCE}] influence ranks them better than {rival} {where}
        | {spearman} less that of {rival}, turned to suit it
      {name}-sign [{SOURCE}] influence has the sign of the effect {where} |
        share of the demonstrations of a prompt
      """,
      {
        name: lab.at_least(goal, ours.spearman),
        f'{name}-better': lab.at_least(0, better),
        f'{name}-sign': lab.at_least(SIGNS, ours.sign),
      },
    )
  alike = statistics.rank_correlation(effects.hidden, effects.removed)
  yield from statements(
    f"""hidden [{SOURCE}] hiding the tokens of a demonstration does what
    deleting them does | Spearman correlation of the two effects within a
    prompt""",
    {'hidden': lab.at_least(AGREEMENT, alike)},
  )


def summary(config: lab.Config, results: Results) -> dict[str, Any]:
  effects = results[0].effects
  positive = effects.difference > 0
  return {
    'num_prompts': config.num_prompts,
    'num_demonstrations': config.num_demonstrations,
    'identity_gap_float32': np.max(effects.identity_gap),
    'hidden_against_removed_spearman': agreement(results),
    'spearman_hide': {
      score: statistics.mean(judged.spearman_hide)
      for score, judged in judge(config, results[0]).items()
    },
    'effect_towards_own_label': towards_own_label(results),
    'mean_absolute_effect_of_removal': np.mean(np.abs(effects.removed)),
    'mean_absolute_logit_difference': np.mean(np.abs(effects.difference)),
    **_by_size(tables(config, results)['scores']),
    'accuracy_of_model': np.mean(positive == results[0].prompts.query_positive),
    'fraction_answered_positive': np.mean(positive),
  }


def _by_size(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Means of each score, by the number of demonstrations."""
  found: dict[str, Any] = {}
  for row in rows:
    task = '' if row['task'] == 'sentiment' else '_other_task'
    for name in ('spearman', 'sign'):
      by_score = found.setdefault(f'{name}_delete{task}', {})
      own = by_score.setdefault(row['score'], {})
      own[str(row['demonstrations'])] = row[name]
  return found


def tables(config: lab.Config, results: Results) -> dict[str, Any]:
  judged = [
    {
      'task': setting.task,
      'demonstrations': setting.size,
      'prompts': len(setting.prompts.tokens),
      'score': name,
      'spearman': statistics.mean(found.spearman),
      'sign': statistics.mean(found.sign),
      'largest': statistics.proportion(found.largest),
      'pearson': found.pearson,
    }
    for setting in results
    for name, found in judge(config, setting).items()
  ]
  return {'scores': judged}


def metrics(config: lab.Config, results: Results) -> list[dict[str, Any]]:
  prompts, effects = results[0].prompts, results[0].effects._asdict()
  names = (
    *('influence', 'contribution', 'removal_effect', 'attention'),
    *('loss_drop', 'removed', 'hidden'),
  )
  num_prompts, size = prompts.positive.shape
  whole = np.broadcast_to(effects['difference'][:, None], (num_prompts, size))
  return lab.tidy(
    {},
    {
      'positive': prompts.positive,
      'num_tokens': prompts.lengths,
      'logit_difference': whole,
      **{x: effects[x] for x in names if effects[x] is not None},
    },
    prompt=range(num_prompts),
    demonstration=range(size),
  )


def figures(config: lab.Config, results: Results) -> list[lab.Figure]:
  each = '; '.join(
    f'{x.task}, {x.size} demonstrations: {len(x.prompts.tokens)} prompts'
    for x in results
  )
  ranked = f"""How well each score ranks the demonstrations of a prompt as
    deleting them does: Spearman correlation, mean over prompts with its 95%
    t-interval. Filled circles: read from the model; open squares: without it;
    the dashed line is no relation, the dotted one what is asked of influence.
    {each}."""
  return [lab.Figure('scores', _draw_scores(config, results), ranked)]


def _draw_scores(config: lab.Config, results: Results) -> Any:
  count = len(results)
  figure, axes = drawing.subplots(
    1, count, figsize=(3.6 * count, 4.6), sharex=True, sharey=True
  )
  names = list(judge(config, results[0]))
  for axis, setting, aim in zip(axes, results, GOALS * 2, strict=True):
    judged = judge(config, setting)  # Not all: some in the first alone.
    for free, look in enumerate(LOOKS):
      rows = {
        x: statistics.mean(judged[x].spearman)
        if x in judged and (x in MODEL_FREE) == free
        else lab.exactly(np.nan)
        for x in names
      }
      drawing.forest(axis, rows, **look)
    axis.axvline(0, color=drawing.GREY, ls='--', lw=1)
    axis.axvline(aim, color=drawing.BLACK, ls=':', lw=1)
    axis.set_title(f'{setting.task}, {setting.size} demonstrations')
    axis.set_xlabel('Spearman correlation')
  return figure


def sentence(config: lab.Config, results: Results) -> str:
  found = [judge(config, setting) for setting in results]
  asked = results[0].effects.difference > 0
  right = np.mean(asked == results[0].prompts.query_positive)

  def all_of(name):
    return ', '.join(f'{np.mean(x[name].spearman):+.2f}' for x in found)

  where = ', '.join(f'{x.task} {x.size}' for x in results)
  signs = ', '.join(f'{np.mean(x[INFLUENCE].sign):.0%}' for x in found)
  return f"""The Spearman correlation with the effect of deleting a
    demonstration, within a prompt ({where} demonstrations; {config.num_prompts}
    prompts of the first task, {config.num_other_prompts} of the second), is
    {all_of(INFLUENCE)} for influence, which has the sign of {signs} of the
    effects right. It is {all_of(ATTRIBUTION)} for direct logit attribution,
    {all_of(REMOVAL)} for the closed-form removal at the last position,
    {all_of(LABEL)} for the label alone and {all_of('random')} for a random
    order. A demonstration moves the logit difference by
    {towards_own_label(results):+.2f} towards its own label (negative: away from
    it). Hiding a demonstration agrees with deleting it to
    {agreement(results).value:.2f}. The model answers {right:.0%} of the first
    queries as the critic did. Influence ranks single deletions; direct
    attribution is exact as a sum, but follows the paths from the heads at the
    last token only."""
