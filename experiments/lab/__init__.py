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
  Claim as Claim,
  Claims as Claims,
  Found as Found,
  at_least as at_least,
  at_most as at_most,
  one_line as one_line,
  statements as statements,
  within as within,
)
from experiments.lab.compiling import (
  compile_quickly as compile_quickly,
  compile_unoptimised as compile_unoptimised,
  compute as compute,
  compute_each as compute_each,
  float64_on_host as float64_on_host,
)
from experiments.lab.config import (
  Config as Config,
  count as count,
  option as option,
)
from experiments.lab.figures import Figure as Figure, style as style
from experiments.lab.loops import scan_blocks as scan_blocks
from experiments.lab.runner import (
  Metrics as Metrics,
  Part as Part,
  command_of as command_of,
  in_threads as in_threads,
  main as main,
  once as once,
  parts as parts,
  run as run,
)
from experiments.lab.statistics import Estimate as Estimate, exactly as exactly
from experiments.lab.tables import tidy as tidy
from experiments.lab.workdir import Workdir as Workdir
