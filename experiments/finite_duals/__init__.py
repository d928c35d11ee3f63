r"""Can finite dual models stand in for the softmax of a real language model?

Every key-value head of a pretrained model gets a feature map fitted to a
calibration text; the first token and the last 16 keep their exact coefficients,
all others are in a dual model `W` of `R` features. Two questions: how far is
the output of a single head from the softmax's, and what are the predictions
worth when all heads of all layers are replaced at once, on text of the same
kind and of another kind::

  python -m experiments.finite_duals --workdir=out/finite_duals

It takes about 11 minutes on two cores. Expect, with 64 landmarks for each
key-value head, medians over 270 heads and means over four texts of 512 tokens
with their 95% intervals, of second halves::

                               error of a head      next token, TV; perplexity
                                                    reviews           plots
  landmarks of the text        .17 [.16, .18]       .13; 1.03         .16; 1.06
  landmarks of other reviews   .23 [.22, .24]       .17; 1.12         .24; 1.17
  first token and window only  .59                  .40; 2.84         .33; 1.32
  64 random features beside    .58                  .41; 2.90         .33; 1.33

Perplexity is over that of the model. Landmarks of other reviews are what can be
decoded with: what is kept of a text no longer grows. Random features change
nothing beside the window, balanced ones hardly (.52), as the budget says
beforehand: for .1 it asks for 10^38 and 10^22. Learnt exponentials come to .25,
without the window none comes below .6. Nystroem features, of either sign, are
lost in float32 (4.0). Where the window alone is good already
(below .2), landmarks of another text make a head worse.
"""

import dataclasses
import functools

from experiments import lab
from experiments.finite_duals import chain, heads
from experiments.lab import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(models.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_tokens: int = lab.option(
    512, 'tokens of a text; its second half is judged', minimum=32, tiny=32
  )
  num_texts: int = lab.option(4, 'texts of each kind', minimum=2, tiny=2)
  num_head_texts: int = lab.count(2, 'texts for single heads', tiny=1)
  counts: tuple[int, ...] = lab.count(
    (16, 32, 64, 128), 'features R', increasing=True, tiny=(4, 8)
  )
  num_features: int = lab.option(
    64, 'features R of single numbers, and of the chain', among='counts', tiny=8
  )
  window: int = lab.count(16, 'last tokens that are exact', tiny=4)
  train_steps: int = lab.count(400, 'steps of the learnt map', tiny=5)


PARTS = lab.parts(heads, chain)
run = functools.partial(lab.run, PARTS)
