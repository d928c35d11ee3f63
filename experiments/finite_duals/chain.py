"""What are the predictions worth when all heads are replaced at once?"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.finite_duals import heads, texts
from experiments.lab import figures as drawing, statistics
from iclcl_jax import features, pretrained, projections
from iclcl_jax.pretrained import finite

TARGETS = {'tv': 0.2, 'perplexity_ratio': 1.2}
KINDS = {'reviews': '', 'plots': '_other_text'}


class Results(NamedTuple):
  """What changes, by kind of text, model, and measure. Arrays `[P]`."""

  # Total variation of the next token, `tv`; perplexity over that of the model,
  # `perplexity_ratio`; share of the same likeliest tokens, `agreement`.
  found: dict[str, dict[str, dict[str, np.ndarray]]]
  num_features: int  # Of each key-value head, `R`.
  floats: dict[str, int]  # Kept of a text by one key-value head: `W`, cache.


@lab.compile_quickly
def _compare(model, changed, tokens) -> dict[str, Any]:
  """Compares the second half of a text."""
  half = tokens.shape[0] // 2
  exact = jax.nn.log_softmax(pretrained.logits(model, tokens)[half:-1])
  found = jax.nn.log_softmax(finite.logits(changed, tokens)[half:-1])
  following = tokens[half + 1 :, None]

  def loss(log_probs):
    return -jnp.mean(jnp.take_along_axis(log_probs, following, 1))

  distance = jnp.abs(jnp.exp(exact) - jnp.exp(found))
  return {
    'tv': jnp.mean(jnp.sum(distance, axis=1)) / 2,
    'perplexity_ratio': jnp.exp(loss(found) - loss(exact)),
    'agreement': jnp.mean(exact.argmax(axis=1) == found.argmax(axis=1)),
  }


def measure(config: Any) -> Results:
  """Replaces all heads by several maps, on both kinds of text."""
  loaded = texts.load(config)
  model, count = loaded.model, config.num_features
  learner = texts.learner(config)
  num_layers, _, num_groups, width = model.blocks.key.weight.shape
  axes = num_layers, num_groups

  def fit(tokens):
    return finite.fit(model, tokens, num_landmarks=count, learner=learner)

  def random(key):
    return projections.orthogonal(key, count, width, dtype=jnp.float32)

  keys = jax.random.split(jax.random.key(config.seed), axes)
  directions = lab.compile_quickly(jax.vmap(jax.vmap(random)))(keys)
  fixed = {
    heads.JUDGED: fit(jnp.asarray(loaded.calibration)),
    heads.WINDOW: finite.FiniteModel(
      model=model, maps=texts.nothing(*axes, width=width), learner=learner
    ),
    heads.RANDOM: finite.FiniteModel(
      model=model, maps=features.PositiveFeatures(directions), learner=learner
    ),
  }
  found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
  for kind in KINDS:
    rows = getattr(loaded, kind)[: config.num_texts]
    measured: dict[str, list[Any]] = {}
    for tokens in map(jnp.asarray, rows):
      for name, changed in ({heads.OWN: fit(tokens)} | fixed).items():
        result = jax.device_get(_compare(model, changed, tokens))
        measured.setdefault(name, []).append(result)
    found[kind] = {
      name: {key: np.array([row[key] for row in results]) for key in results[0]}
      for name, results in measured.items()
    }
  kept = (learner.num_sinks + learner.window) * 2 * width
  floats = {'state': count * (width + 2) + kept, 'cache': 2 * width}
  return Results(found, count, floats)


def _of(results: Results, kind: str, name: str, key: str) -> lab.Estimate:
  """Mean over texts, of ratios the geometric one."""
  samples = results.found[kind][name][key]
  if key == 'perplexity_ratio':
    return statistics.geometric_mean(samples)
  return statistics.mean(samples)


def claims(config: Any, results: Results) -> lab.Claims:
  words = {
    'tv': 'mean total variation of the next token',
    'perplexity_ratio': 'perplexity over that of the model',
  }
  for kind, (key, target) in itertools.product(KINDS, TARGETS.items()):
    name = f'{kind}-{key.replace("_", "-")}'
    yield from lab.statements(
      'finite-duals-',
      f"""{name} [ours; Zhang et al., arXiv:2410.10254, by training] all heads
      of a real model can be finite dual models at once, fitted to reviews and
      read on {kind} | {words[key]}, {results.num_features} landmarks for each
      key-value head, window {config.window}, mean over {config.num_texts}
      texts""",
      {name: lab.at_most(target, _of(results, kind, heads.JUDGED, key))},
    )


def summary(config: Any, results: Results) -> dict[str, Any]:
  names = {'mean_tv': 'tv', 'perplexity_ratio': 'perplexity_ratio'}
  found: dict[str, Any] = {
    f'{name}_r{results.num_features}{suffix}{own}': _of(
      results, kind, maps, key
    ).value
    for name, key in names.items()
    for kind, suffix in KINDS.items()
    for maps, own in ((heads.JUDGED, ''), (heads.OWN, '_own'))
  }
  found['chain'] = {
    kind: {
      name: {key: _of(results, kind, name, key) for key in measures}
      for name, measures in by_name.items()
    }
    for kind, by_name in results.found.items()
  }
  return found | {'floats_of_a_head': results.floats}


def tables(config: Any, results: Results) -> dict[str, Any]:
  return {
    'chain': [
      {'text': kind, 'heads': name}
      | {key: _of(results, kind, name, key).value for key in measures}
      for kind, by_name in results.found.items()
      for name, measures in by_name.items()
    ]
  }


def sentence(config: Any, results: Results) -> str:
  def said(kind, name):
    values = [_of(results, kind, name, key).value for key in TARGETS]
    return f'{values[0]:.2f} and {values[1]:.2f}'

  return f"""With all heads replaced, the next token changes by a total
    variation of, and perplexity by a factor of, {said('reviews', heads.JUDGED)}
    on other reviews and {said('plots', heads.JUDGED)} on plots;
    {said('reviews', heads.WINDOW)} and {said('plots', heads.WINDOW)} with the
    window alone."""


def figures(config: Any, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(13, 4))
  titles = 'total variation of the next token', 'perplexity, ratio'
  for axis, (k, goal), title in zip(axes, TARGETS.items(), titles, strict=True):
    for shift, kind in enumerate(KINDS):
      names = list(results.found[kind])
      bands = [_of(results, kind, name, k) for name in names]
      places = np.arange(len(names)) + 0.2 * shift
      look = drawing.look(shift) | {'linestyle': 'none'}
      drawing.bars(axis, places, bands, label=kind, **look)
    axis.axhline(goal, color=drawing.GREY, linewidth=1)
    axis.set_xticks(np.arange(len(names)) + 0.1, names)
    axis.set(ylabel=title, ylim=(0, None))
  axes[1].set_ylim(0.9, None)
  axes[0].legend()
  caption = f"""All heads of all layers replaced, {results.num_features}
    features for each key-value head, first token and last {config.window}
    exact: mean over texts with its interval, in second halves. Landmarks were
    fitted to other reviews; own ones to the very text."""
  return [lab.Figure('chain', figure, caption)]
