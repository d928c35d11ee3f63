"""The papers' schemes, redrawn: no data, only what is connected to what."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import lab
from experiments.lab import figures

TRAINED, FIXED, DATA = '#D7E8F5', '#FFFFFF', '#F6E3D3'


class Box(NamedTuple):
  """A text in a box: lower left corner, width, colour, height."""

  text: str
  x: float
  y: float
  width: float
  colour: str = FIXED
  height: float = 0.13


class Arrow(NamedTuple):
  """From a box to a box, between their middles, with a label."""

  start: str
  end: str
  line: str
  label: str


def _arrows(text: str) -> list[Arrow]:
  """Arrows `start end label`, or dashed ones `start end -- label`."""
  pattern = r'(\S+) (\S+) ?(--)? ?(.*)'
  found = (re.fullmatch(pattern, x.strip()) for x in text.split(';'))
  return [Arrow(x[1], x[2], x[3] or '-', x[4]) for x in found if x]


def save(folder: lab.Workdir) -> list[dict[str, str]]:
  """Draws all schemes into `figures/`; returns `{file, caption}` of each."""
  with lab.style():
    return [
      figures.save(folder, lab.Figure(f'scheme_{name}', draw(), caption))
      for name, (draw, caption) in _schemes().items()
    ]


def _schemes() -> dict[str, tuple[Callable[[], Any], str]]:
  return {
    'equivalence': (
      _equivalence,
      'One query of an attention layer (left) and its dual model (right). Keys '
      'are training inputs, values are labels, the query is the test input; '
      'the query side gives the weights before the step. Both arrows end in '
      'the same number.',
    ),
    'learning': (
      _learning,
      'Three ways to learn a representation from pairs. In the dual model the '
      'target is constant by construction: nothing has to stop its gradient, '
      'and it cannot collapse in one step. Trained parts are shaded.',
    ),
    'layer': (
      _layer,
      'A whole pre-norm Transformer layer as one dual model: at a given query, '
      'normalisation and feed-forward part act on the labels as one matrix J '
      '(exact, but known only after the query), the residual is a bias. Layers '
      'in a chain: predictions of one are training data of the next.',
    ),
  }


def _equivalence() -> Any:
  boxes = {
    'tokens': Box(r'tokens $x_1 \ldots x_N$, query $x_q$', 0.3, 0.88, 0.4),
    'k': Box('keys $k_i$', 0.0, 0.51, 0.14, DATA),
    'v': Box('values $v_i$', 0.16, 0.51, 0.14, DATA),
    'q': Box('query $q$', 0.32, 0.51, 0.12, DATA),
    'scores': Box(r'scores $\phi(k_i)\cdot\phi(q)$', 0.0, 0.26, 0.2),
    'out': Box(r'$h = \sum_i a_i\, v_i$', 0.16, 0.02, 0.26),
    'input': Box(r'inputs $\phi(k_i)$', 0.54, 0.51, 0.14, DATA),
    'label': Box('labels $v_i$', 0.7, 0.51, 0.13, DATA),
    'test': Box(r'test input $\phi(q)$', 0.85, 0.51, 0.15, DATA),
    'step': Box(
      r'$W_1 = W_0 - \nabla L,\;\; L = -\sum_i v_i \cdot W\phi(k_i) / D$',
      *(0.49, 0.26, 0.36, TRAINED),
    ),
    'prediction': Box(r'$f(q) = W_1\,\phi(q)$', 0.74, 0.02, 0.26),
  }
  arrows = _arrows(
    """
    tokens k $W_K$; tokens v $W_V$; tokens q $W_Q$; tokens input; tokens label;
    tokens test; k scores; q scores; scores out divide by $D$; v out;
    input step; label step; step prediction one step; test prediction;
    out prediction equal
    """
  )
  return _draw(boxes, arrows, {'attention': 0.17, 'dual model': 0.77})


def _learning() -> Any:
  target = 'target encoder\n(gradient stopped)'
  boxes = {
    'x1': Box('sample', 0.08, 0.85, 0.14, DATA),
    'a1': Box('view 1', 0.0, 0.62, 0.13),
    'b1': Box('view 2', 0.17, 0.62, 0.13),
    'e1': Box('encoder,\npredictor', 0.0, 0.34, 0.13, TRAINED, 0.17),
    't1': Box(target, 0.15, 0.34, 0.17, FIXED, 0.17),
    'l1': Box('cosine of unit vectors', 0.02, 0.05, 0.27),
    'a2': Box('anchor', 0.36, 0.85, 0.09, DATA),
    'b2': Box('positive', 0.465, 0.85, 0.09, DATA),
    'c2': Box('negative', 0.57, 0.85, 0.09, DATA),
    'w2': Box(
      '$f = W\\phi$ for all three,\n$WW^\\top = I$',
      *(0.38, 0.45, 0.26, TRAINED, 0.17),
    ),
    'l2': Box(r'$f_a\cdot(f_- - f_+)$', 0.4, 0.05, 0.22),
    'x3': Box('token $x_i$', 0.78, 0.85, 0.14, DATA),
    'a3': Box('key $x_i W_K$', 0.7, 0.62, 0.13),
    'b3': Box('value $x_i W_V$', 0.87, 0.62, 0.13),
    'w3': Box(r'$W\phi$, one step', 0.7, 0.36, 0.13, TRAINED),
    'l3': Box(r'inner product $v_i\cdot W\phi(k_i)$', 0.7, 0.05, 0.3),
  }
  arrows = _arrows(
    """
    x1 a1; x1 b1; a1 e1; b1 t1; e1 l1; t1 l1 --; a2 w2; b2 w2; c2 w2; w2 l2;
    x3 a3; x3 b3; a3 w3; w3 l3; b3 l3 -- constant
    """
  )
  titles = {
    'SimSiam, BYOL': 0.15,
    'contrastive kernel learning': 0.51,
    'dual model of attention': 0.85,
  }
  return _draw(boxes, arrows, titles)


def _layer() -> Any:
  boxes = {
    'x': Box('tokens $x_i$', 0.0, 0.45, 0.12, DATA),
    'norm': Box('norm', 0.16, 0.45, 0.09),
    'att': Box('heads, $W_O$', 0.29, 0.45, 0.13),
    'add': Box('$u = x_q + h\\,W_O$', 0.46, 0.45, 0.16),
    'ffn': Box('norm, feed-forward', 0.66, 0.45, 0.17),
    'y': Box('$y$', 0.87, 0.45, 0.08),
    'dual': Box(
      'dual model of each head: one step on labels $v_i W_O J$',
      *(0.16, 0.1, 0.46, TRAINED),
    ),
    'bias': Box('+ bias from $x_q$', 0.66, 0.1, 0.17),
  }
  arrows = _arrows(
    """
    x norm; norm att; att add; add ffn; ffn y; norm dual;
    ffn dual $J$ at this query; dual bias; bias y equal
    """
  )
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
  text: dict[str, Any] = {'ha': 'center', 'va': 'center'}
  patches, middles = {}, {}
  for name, box in boxes.items():
    patches[name] = plt.Rectangle(
      (box.x, box.y), box.width, box.height, fc=box.colour, ec='black'
    )
    axis.add_patch(patches[name])
    middles[name] = box.x + box.width / 2, box.y + box.height / 2
    axis.text(*middles[name], box.text, **text)
  for arrow in arrows:
    start, end = middles[arrow.start], middles[arrow.end]
    style = {
      'arrowstyle': '-|>',
      'color': 'black',
      'linestyle': arrow.line,
      'patchA': patches[arrow.start],
      'patchB': patches[arrow.end],
    }
    axis.annotate('', xy=end, xytext=start, arrowprops=style)
    axis.text(
      (start[0] + end[0]) / 2,
      (start[1] + end[1]) / 2,
      arrow.label,
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
      **text,
    )
  for title, x in titles.items():
    axis.text(x, 1.05, title, ha='center', fontsize=13, fontweight='bold')
  return figure
