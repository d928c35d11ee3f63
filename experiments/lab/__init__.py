"""What every experiment shares, and nothing else.

An experiment is a module or package `experiments.NAME` with a `Config`, its
`PARTS` and a `run`::

  class Config(lab.Config):
    seed: int = lab.option(0, 'root of all random numbers', minimum=0)

  PARTS = {'question': lab.Part(measure, claims, figures)}

  def conclude(config, results, claims) -> str: ...

  def run(config, workdir):
    return lab.run(PARTS, config, workdir, conclude=conclude)

One question lies in one file: `measure(config)` returns typed results, which
`claims(config, results)` judges and `figures(config, results)` draws.
"""

from experiments.lab.claims import Claim, judge
from experiments.lab.compiling import (
  compile_quickly,
  compile_unoptimised,
  float64_on_host,
)
from experiments.lab.config import Config, option
from experiments.lab.figures import Figure, style
from experiments.lab.loops import scan_blocks
from experiments.lab.runner import Part, in_threads, main, once, run
from experiments.lab.statistics import Estimate, exactly
from experiments.lab.workdir import Workdir

__all__ = [
  'Claim',
  'Config',
  'Estimate',
  'Figure',
  'Part',
  'Workdir',
  'compile_quickly',
  'compile_unoptimised',
  'exactly',
  'float64_on_host',
  'in_threads',
  'judge',
  'main',
  'once',
  'option',
  'run',
  'scan_blocks',
  'style',
]
