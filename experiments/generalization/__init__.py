r"""The generalisation bound of the dual model: how large is the gap really?

Theorem 3.2 bounds, for all weights of a ball at once, the gap between the
representation loss `L(W) = E[-v . W phi(k)]` and its mean over N
demonstrations. The gap is linear in `W`, so its supremum over the ball is
known in closed form; it is measured here with exact expectations, for random
features and for the exact softmax kernel, and set beside the bound with
explicit constants, the Rademacher complexity by Monte Carlo, and the published
order of magnitude with its factor of the output dimension::

  python -m experiments.generalization --workdir=out/generalization

It takes 50 s of CPU time, much of it compilation, spread over two cores.
Numbers to expect (10 seeds, 20 samples of each, 95 % intervals)::

  slope of the gap in N, random features          -.51 [-.51, -.50]
  slope of the gap in N, exact softmax kernel     -.51 [-.52, -.50]
  gap over w sqrt(E[|v|^2 k(k,k)] / N)            .98 [.96, .99]
  Monte-Carlo complexity over its closed form     .98 [.98, .99]
  largest gap of all samples / bound              .018 (complexity term: 1.0)
  slope of the gap in d_v, Frobenius ball         .02 [.01, .03]
  slope of the gap in d_v, spectral ball          .30 [.29, .31]
  slope of Tr K / N in N, bounded keys            -.002 [-.006, .002]
  the same where the mean of k(k, k) is infinite  .71 [.56, .87]
  slope of the gap in N there                     -.15 [-.29, -.01]

A seed (a distribution and a feature map) is the unit: intervals are 95 %
t-intervals over seeds of means over samples, slopes are fitted for each seed.
The radius of the ball is 1: every term is proportional to it.

References:
  Ren & Liu, arXiv:2310.13220v2, Theorem 3.2.
"""

import dataclasses
import functools

from experiments import lab
from experiments.generalization import bound, distribution, trace, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(10, 'distributions and maps', minimum=5, tiny=5)
  num_samples: int = lab.option(20, 'samples of a seed', minimum=2, tiny=3)
  num_demonstrations: tuple[int, ...] = lab.count(
    (16, 32, 64, 128, 256, 512),
    'demonstrations N of a sample',
    maximum=distribution.MAX_SIZE,
    min_items=3,
    increasing=True,
    tiny=(2, 4, 8),
  )
  width: int = lab.count(4, 'width d_v of values where N varies', tiny=2)
  widths: tuple[int, ...] = lab.count(
    (1, 4, 16, 64),
    'widths d_v at one N',
    maximum=distribution.MAX_SIZE,
    min_items=3,
    increasing=True,
    tiny=(1, 2, 4),
  )
  width_demonstrations: int = lab.count(256, 'N where widths vary', tiny=8)
  num_features: int = lab.count(200, 'positive random features R', tiny=6)
  num_signs: int = lab.count(32, 'sign vectors of an estimate', tiny=4)
  num_sign_samples: int = lab.count(
    4, 'most samples of a seed with such an estimate', tiny=2
  )
  delta: float = lab.option(0.05, 'failure probability', above=0, below=1)
  heavy_scale: float = lab.option(
    1.2,
    'standard deviation of keys of infinite mean kernel',
    # 2 s^2 >= sqrt(d_k): the mean of k(k, k) is infinite.
    minimum=(distribution.KEY_DIM**0.5 / 2) ** 0.5,
  )
  num_traces: int = lab.option(20, 'runs of the trace', minimum=5, tiny=5)
  trace_demonstrations: int = lab.option(
    65536, 'largest N of the trace', minimum=64, tiny=64
  )

  def check(self):
    self.require(
      self.trace_demonstrations >= max(self.num_demonstrations),
      'trace_demonstrations',
      f'at least the largest of num_demonstrations, '
      f'{max(self.num_demonstrations)}',
    )


PARTS = lab.parts(bound, width, trace)


def conclude(config, results, claims) -> str:

  def number(name):
    return f'{claims[f"generalization/{name}"].estimate:.2f}'

  return f"""The largest gap between the representation loss and its mean over N
    bounded demonstrations scales with N to the power {number('rate_features')}
    for random features and {number('rate_softmax')} for the exact softmax
    kernel. The largest gap of any weights in any sample was
    {claims['generalization/largest_features'].estimate:.3f} of the bound with
    explicit constants. With the output width d_v it scales to the power
    {number('width_frobenius')} in the Frobenius ball and
    {number('width_spectral')} in the spectral ball, where a factor d would be a
    power of 1. For normal keys of standard deviation {config.heavy_scale:g},
    whose k(k, k) has an infinite mean, Tr K / N scales to the power
    {number('trace_heavy')} instead of 0, and the gap to the power
    {number('rate_heavy')}. The bound is about the representation loss, not
    about the error of a label."""


run = functools.partial(lab.run, PARTS, conclude=conclude, workers=2)
