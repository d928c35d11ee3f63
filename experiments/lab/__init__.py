"""What every experiment shares, and nothing else.

An experiment is a module or package `experiments.NAME` with a `Config`, its
`PARTS` and a `run`::

  class Config(lab.Config):
    seed: int = lab.option(0, 'root of all random numbers', minimum=0)

  PARTS = lab.parts(question)
  run = functools.partial(lab.run, PARTS)

One question lies in one file, a module of the package: `measure(config)`
returns typed results, which `claims(config, results)` judges,
`figures(config, results)` draws and `sentence(config, results)` concludes.
"""

from experiments.lab.claims import (
  Claim,
  Found,
  at_least,
  at_most,
  judge,
  one_line,
  statements,
  within,
)
from experiments.lab.compiling import (
  compile_quickly,
  compile_unoptimised,
  compute,
  distance,
  float64_on_host,
  largest_errors,
)
from experiments.lab.config import Config, count, option
from experiments.lab.figures import Figure, style
from experiments.lab.loops import scan_blocks
from experiments.lab.runner import Part, in_threads, main, once, parts, run
from experiments.lab.statistics import Estimate, exactly
from experiments.lab.tables import tidy
from experiments.lab.workdir import Workdir

__all__ = [
  'Claim',
  'Config',
  'Estimate',
  'Figure',
  'Found',
  'Part',
  'Workdir',
  'at_least',
  'at_most',
  'compile_quickly',
  'compile_unoptimised',
  'compute',
  'count',
  'distance',
  'exactly',
  'float64_on_host',
  'in_threads',
  'judge',
  'largest_errors',
  'main',
  'once',
  'one_line',
  'option',
  'parts',
  'run',
  'scan_blocks',
  'statements',
  'style',
  'tidy',
  'within',
]
