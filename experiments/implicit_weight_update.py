r"""Is a prompt's context a change of the weights, and for whom?

What a context does to a token in a block is a change of rank one of the first
weights behind the heads, and a shift. The identity is checked in all blocks of
a pretrained model at all positions: behind each block, the stream without the
context and with the changed weights is compared with the stream that has seen
the context. Beside it stands what the change is good for: whether that of one
token serves the next one, and how large it is::

  python -m experiments.implicit_weight_update --workdir=out/implicit

It takes two minutes of CPU time. Expect residuals of 6.6e-6 (float32) and 6e-15
(float64), and that a token leaves .78 [.73, .83] of the error if it borrows the
change of the token before it (1 is no change at all; medians over tokens and 30
layers, mean over four prompts): a part is common to both, most is not. The
change of `up` is 1.3 % of its norm.

The dual states of the same context are the other exact description. They are
the same for all queries, they can be added, removed and merged, and they grow
with the context; a change of rank one has a fixed size and is made for one
token. So: dual states to change what is learnt, changes of weights to compare
with finetuning.

References:
  Dherin et al., arXiv:2507.16003; arXiv:2511.17864 (all blocks).
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.demonstration_deletion import prompts as prompting
from experiments.lab import figures as drawing, models, statistics, texts
from iclcl_jax import pretrained, transformer
from iclcl_jax.accounts import implicit_weight_update as account

SOURCE = 'Dherin et al., arXiv:2507.16003'
BOUNDS = {'float32': 1e-5, 'float64': 1e-12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(models.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_prompts: int = lab.option(4, 'prompts', minimum=2, tiny=2)
  num_demonstrations: int = lab.option(
    4, 'demonstrations of a prompt', minimum=2, maximum=16, tiny=2
  )
  max_tokens: int = lab.option(26, 'most tokens of a demonstration', minimum=16)


class Results(NamedTuple):
  """What was measured, of `P` prompts and `L` layers."""

  residual: dict[str, float]  # Largest, by dtype.
  # Error of a token's block with the change of the token before it, relative to
  # that without any change; median over the tokens behind the context. `[P, L]`
  borrowed: np.ndarray
  size: np.ndarray  # Of the change of `up`, over `up`; likewise. `[P, L]`
  floats: dict[str, int]  # Kept for one layer: a change, the dual states.


def measure(config: Config) -> Results:
  """Checks the identity in both precisions, and measures the changes."""
  model, tokenizer = models.load(config)
  shape = config.num_prompts, config.num_demonstrations
  prompts = prompting.make(config, tokenizer, texts.TASKS['sentiment'], *shape)
  rows = []
  for tokens, mask, segments in zip(*prompts[:3], strict=True):
    last = np.flatnonzero(segments[mask] >= 0)[-1]
    rows.append((jnp.asarray(tokens[mask]), np.arange(mask.sum()) <= last))
  with jax.default_matmul_precision('highest'):
    single = max(float(_residual(model, *row)) for row in rows)
    found = [_borrow(model, *row) for row in rows]
  with lab.float64_on_host():
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
    double = max(float(_residual(wide, *row)) for row in rows[:2])
  borrowed, size = (np.stack(x) for x in zip(*found, strict=True))
  blocks, length = model.blocks, int(np.sum(rows[0][1]))
  d_model, d_ff = blocks.up.weight.shape[1:]
  kept = 2 * int(np.prod(blocks.key.weight.shape[2:])) * length
  change = 2 * d_model + d_ff * (1 if blocks.gate is None else 2)
  return Results(
    {'float32': single, 'float64': double},
    borrowed,
    size,
    {'change, of one token': change, 'dual states, of all queries': kept},
  )


@lab.compile_quickly
def _residual(model, tokens, context):
  x = pretrained.embed(model, tokens)
  found = account.residuals(model.architecture, model.blocks, x, context)
  return jnp.max(found)


@lab.compile_quickly
def _borrow(model, tokens, context):
  """Blocks with the changes of the tokens before, and sizes of the changes."""
  architecture = model.architecture

  def layer(x, block):
    update = account.weight_update(architecture, block, x, context)
    exact = transformer.apply_block(architecture, block, x)
    # Its own reading and shift, but the weights of the token before it.
    names = 'read', 'change'
    before = {x: jnp.roll(getattr(update, x), 1, axis=0) for x in names}
    borrowed = update._replace(**before)
    lent = account.apply_update(architecture, block, x, borrowed)
    none = update._replace(change=jnp.zeros_like(update.change))
    plain = account.apply_update(architecture, block, x, none)
    ratio, without = (jnp.linalg.norm(x - exact, axis=1) for x in (lent, plain))
    ratio = ratio / without
    grown = jnp.linalg.norm(update.change @ block.up.weight, axis=1)
    size = grown / jnp.linalg.norm(update.read, axis=1)
    behind = jnp.roll(~context, 1) & ~context  # So is the token before it.

    def median(rows):
      return jnp.nanmedian(jnp.where(behind, rows, jnp.nan))

    size = median(size) / jnp.linalg.norm(block.up.weight)
    return exact, (median(ratio), size)

  x = pretrained.embed(model, tokens)
  return transformer.scan_blocks(architecture, model.blocks, layer, x)[1]


def _layers(rows: np.ndarray) -> lab.Estimate:
  """Mean over prompts of the median over layers."""
  return statistics.mean(np.median(rows, axis=1))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  found = {
    f'identity-{dtype}': lab.at_most(bound, results.residual[dtype])
    for dtype, bound in BOUNDS.items()
  }
  text = ''.join(
    f'identity-{dtype} [{SOURCE}] without its context a model with changed '
    'weights is the model with it, block by block | largest residual over '
    f'layers, positions and prompts, {dtype}\n'
    for dtype in BOUNDS
  )
  text += f"""borrowed [{SOURCE}] the change is knowledge: that of one token
    serves the next | error with the change of the token before, over the error
    without any, median over tokens and layers, mean over prompts"""
  found['borrowed'] = lab.at_most(1.0, _layers(results.borrowed))
  return lab.statements('implicit-', text, found)


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'residual': results.residual,
    'borrowed': _layers(results.borrowed),
    'size': _layers(results.size),
    'floats_of_a_layer': results.floats,
  }


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(11, 3.6))
  layers = np.arange(results.size.shape[1])
  for axis, rows, label in zip(
    axes,
    (results.size, results.borrowed),
    ('size of the change of the weights', "error with another token's change"),
    strict=True,
  ):
    drawing.means(axis, layers, rows, **drawing.look(0))
    axis.set(xlabel='layer', ylabel=label, ylim=(0, None))
  axes[1].axhline(1, color=drawing.GREY, linewidth=1)
  caption = f"""Left: norm of the change that stands for the context, over that
    of the weights. Right: error of a block with the change of the token before,
    over that without any change (grey: no better than none). Medians over the
    tokens behind the context, mean over {config.num_prompts} prompts with its
    interval."""
  return [lab.Figure('implicit', figure, caption)]


PARTS = {'implicit': lab.Part(measure, claims, figures, summary)}


def conclude(config: Config, results, claims) -> str:
  found = results['implicit']
  residual = found.residual
  return f"""Without its context, the model with changed weights is the model
    with it, up to {residual['float32']:.1e} (float32) and
    {residual['float64']:.1e} (float64), at all layers and positions. The change
    that belongs to one token leaves {_layers(found.borrowed):.2f} of the error
    if the next token borrows it."""


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
