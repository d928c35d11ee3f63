"""The papers' schemes, redrawn: no data, only what is connected to what."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import equivalence_figures, harness

TRAINED, FIXED, DATA = '#D7E8F5', '#FFFFFF', '#F6E3D3'
DOWN = (0.5, 0.0), (0.5, 1.0)  # From the lower to the upper edge.
ACROSS = (1.0, 0.5), (0.0, 0.5)


class Box(NamedTuple):
  """A text in a box: lower left corner, width, height, colour."""

  text: str
  x: float
  y: float
  width: float
  height: float = 0.13
  colour: str = FIXED


class Arrow(NamedTuple):
  """From a box to a box, at fractions of their sizes, with a label."""

  start: str
  end: str
  ports: tuple[tuple[float, float], tuple[float, float]] = DOWN
  label: str = ''
  dashed: bool = False


def save(workdir: harness.Workdir) -> list[dict[str, str]]:
  """Draws all schemes into `figures/`.

  Args:
    workdir: folder whose `figures/` exists.

  Returns:
    `{file, caption}` of each.
  """
  captions = {
    'scheme_equivalence': 'One query of an attention layer (left) and its dual '
    'model (right). Keys are training inputs, values are labels, the query is '
    'the test input; the query side gives the weights before the step. Both '
    'arrows end in the same number.',
    'scheme_learning': 'Three ways to learn a representation from pairs. In '
    'the dual model the target is constant by construction: nothing has to '
    'stop its gradient, and it cannot collapse in one step. Trained parts are '
    'shaded.',
    'scheme_layer': 'A whole pre-norm Transformer layer as one dual model: at '
    'a given query, normalisation and feed-forward part act on the labels as '
    'one matrix J (exact, but known only after the query), the residual is a '
    'bias. Layers in a chain: predictions of one are training data of the '
    'next.',
  }
  drawings = {
    'scheme_equivalence': _equivalence,
    'scheme_learning': _learning,
    'scheme_layer': _layer,
  }
  with equivalence_figures.style():
    for name, draw in drawings.items():
      harness.save_figure(workdir, name, draw())
  return [
    {'file': f'figures/{name}.png', 'caption': caption}
    for name, caption in captions.items()
  ]


def _equivalence() -> Any:
  boxes = {
    'tokens': Box('tokens $x_1 \\ldots x_N$, query $x_q$', 0.3, 0.85, 0.4),
    'k': Box('keys $k_i$', 0.0, 0.58, 0.14, colour=DATA),
    'v': Box('values $v_i$', 0.16, 0.58, 0.14, colour=DATA),
    'q': Box('query $q$', 0.32, 0.58, 0.12, colour=DATA),
    'scores': Box(
      'scores $\\phi(k_i)\\cdot\\phi(q)$', 0.0, 0.3, 0.28, colour=FIXED
    ),
    'out': Box('$h = \\sum_i a_i\\, v_i$', 0.08, 0.02, 0.28),
    'input': Box('inputs $\\phi(k_i)$', 0.54, 0.58, 0.14, colour=DATA),
    'label': Box('labels $v_i$', 0.7, 0.58, 0.13, colour=DATA),
    'test': Box('test input $\\phi(q)$', 0.85, 0.58, 0.15, colour=DATA),
    'step': Box(
      '$W_1 = W_0 - \\nabla L,\\;\\; L = -\\sum_i v_i \\cdot W\\phi(k_i) / D$',
      0.5,
      0.3,
      0.4,
      colour=TRAINED,
    ),
    'prediction': Box('$f(q) = W_1\\,\\phi(q)$', 0.62, 0.02, 0.28),
  }
  arrows = [
    Arrow('tokens', 'k', ((0.1, 0), (0.5, 1)), '$W_K$'),
    Arrow('tokens', 'v', ((0.2, 0), (0.5, 1)), '$W_V$'),
    Arrow('tokens', 'q', ((0.35, 0), (0.5, 1)), '$W_Q$'),
    Arrow('tokens', 'input', ((0.65, 0), (0.5, 1))),
    Arrow('tokens', 'label', ((0.8, 0), (0.5, 1))),
    Arrow('tokens', 'test', ((0.9, 0), (0.5, 1))),
    Arrow('k', 'scores', ((0.5, 0), (0.25, 1))),
    Arrow('q', 'scores', ((0.5, 0), (0.9, 1))),
    Arrow('scores', 'out', ((0.4, 0), (0.3, 1)), 'divide by $D$'),
    Arrow('v', 'out', ((0.95, 0), (0.85, 1))),
    Arrow('input', 'step', ((0.5, 0), (0.28, 1))),
    Arrow('label', 'step', ((0.5, 0), (0.66, 1))),
    Arrow('step', 'prediction', ((0.4, 0), (0.15, 1)), 'one step'),
    Arrow('test', 'prediction', ((0.75, 0), (0.95, 1))),
    Arrow('out', 'prediction', ACROSS, 'equal'),
  ]
  return _draw(boxes, arrows, {'attention': 0.17, 'dual model': 0.77})


def _learning() -> Any:
  boxes = {
    'x1': Box('sample', 0.08, 0.85, 0.14, colour=DATA),
    'a1': Box('view 1', 0.0, 0.62, 0.13),
    'b1': Box('view 2', 0.17, 0.62, 0.13),
    'e1': Box('encoder,\npredictor', 0.0, 0.34, 0.13, 0.17, TRAINED),
    't1': Box('target encoder\n(gradient stopped)', 0.15, 0.34, 0.17, 0.17),
    'l1': Box('cosine of unit vectors', 0.02, 0.05, 0.27),
    'a2': Box('anchor', 0.36, 0.85, 0.09, colour=DATA),
    'b2': Box('positive', 0.465, 0.85, 0.09, colour=DATA),
    'c2': Box('negative', 0.57, 0.85, 0.09, colour=DATA),
    'w2': Box(
      '$f = W\\phi$ for all three,\n$WW^\\top = I$',
      0.38,
      0.45,
      0.26,
      0.17,
      TRAINED,
    ),
    'l2': Box('$f_a\\cdot(f_- - f_+)$', 0.4, 0.05, 0.22),
    'x3': Box('token $x_i$', 0.78, 0.85, 0.14, colour=DATA),
    'a3': Box('key $x_i W_K$', 0.7, 0.62, 0.13),
    'b3': Box('value $x_i W_V$', 0.87, 0.62, 0.13),
    'w3': Box('$W\\phi$, one step', 0.7, 0.36, 0.13, 0.13, TRAINED),
    'l3': Box('inner product $v_i\\cdot W\\phi(k_i)$', 0.7, 0.05, 0.3),
  }
  arrows = [
    Arrow('x1', 'a1', ((0.3, 0), (0.6, 1))),
    Arrow('x1', 'b1', ((0.7, 0), (0.4, 1))),
    Arrow('a1', 'e1'),
    Arrow('b1', 't1'),
    Arrow('e1', 'l1', ((0.5, 0), (0.2, 1))),
    Arrow('t1', 'l1', ((0.5, 0), (0.8, 1)), dashed=True),
    Arrow('a2', 'w2', ((0.5, 0), (0.15, 1))),
    Arrow('b2', 'w2', ((0.5, 0), (0.5, 1))),
    Arrow('c2', 'w2', ((0.5, 0), (0.85, 1))),
    Arrow('w2', 'l2'),
    Arrow('x3', 'a3', ((0.3, 0), (0.6, 1))),
    Arrow('x3', 'b3', ((0.7, 0), (0.4, 1))),
    Arrow('a3', 'w3'),
    Arrow('w3', 'l3', ((0.5, 0), (0.22, 1))),
    Arrow('b3', 'l3', ((0.5, 0), (0.78, 1)), 'constant', dashed=True),
  ]
  titles = {
    'SimSiam, BYOL': 0.15,
    'contrastive kernel learning': 0.51,
    'dual model of attention': 0.85,
  }
  return _draw(boxes, arrows, titles)


def _layer() -> Any:
  boxes = {
    'x': Box('tokens $x_i$', 0.0, 0.45, 0.12, colour=DATA),
    'norm': Box('norm', 0.16, 0.45, 0.09),
    'att': Box('heads, $W_O$', 0.29, 0.45, 0.13),
    'add': Box('$u = x_q + h\\,W_O$', 0.46, 0.45, 0.16),
    'ffn': Box('norm, feed-forward', 0.66, 0.45, 0.17),
    'y': Box('$y$', 0.87, 0.45, 0.08),
    'dual': Box(
      'dual model of each head: one step on labels $v_i W_O J$', 0.16, 0.1, 0.46
    ),
    'bias': Box('bias from $x_q$', 0.66, 0.1, 0.17),
  }
  boxes['dual'] = boxes['dual']._replace(colour=TRAINED)
  arrows = [
    Arrow('x', 'norm', ACROSS),
    Arrow('norm', 'att', ACROSS),
    Arrow('att', 'add', ACROSS),
    Arrow('add', 'ffn', ACROSS),
    Arrow('ffn', 'y', ACROSS),
    Arrow('norm', 'dual', ((0.5, 0), (0.1, 1))),
    Arrow('ffn', 'dual', ((0.2, 0), (0.95, 1)), '$J$ at this query'),
    Arrow('dual', 'bias', ACROSS, '+'),
    Arrow('bias', 'y', ((1, 0.5), (0.5, 0)), 'equal'),
  ]
  return _draw(boxes, arrows, {}, top=0.62)


def _draw(
  boxes: Mapping[str, Box],
  arrows: Sequence[Arrow],
  titles: Mapping[str, float],
  *,
  top: float = 1.1,
) -> Any:
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(11, 4.6 * top))
  axis.set(xlim=(-0.01, 1.01), ylim=(-0.02, top))
  axis.axis('off')
  for box in boxes.values():
    corner = box.x, box.y
    axis.add_patch(
      plt.Rectangle(
        corner, box.width, box.height, facecolor=box.colour, edgecolor='black'
      )
    )
    axis.text(
      box.x + box.width / 2,
      box.y + box.height / 2,
      box.text,
      ha='center',
      va='center',
      fontsize=11,
    )
  for arrow in arrows:
    start, end = (
      (box.x + box.width * port[0], box.y + box.height * port[1])
      for box, port in zip(
        (boxes[arrow.start], boxes[arrow.end]), arrow.ports, strict=True
      )
    )
    style = {
      'arrowstyle': '-|>',
      'color': 'black',
      'linestyle': '--' if arrow.dashed else '-',
    }
    axis.annotate('', xy=end, xytext=start, arrowprops=style)
    axis.text(
      (start[0] + end[0]) / 2,
      (start[1] + end[1]) / 2,
      arrow.label,
      fontsize=10,
      ha='center',
      va='center',
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
    )
  for text, x in titles.items():
    axis.text(x, 1.05, text, ha='center', fontsize=13, fontweight='bold')
  return figure
