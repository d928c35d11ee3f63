"""What a user of the installed package relies on: its version and its types."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import iclcl_jax

ROOT = pathlib.Path(__file__).parents[1]

USER = """
import jax
from iclcl_jax import attention, equivalence, features, kernels, projections

x = jax.random.normal(jax.random.key(0), (16, 8))
phi = features.PositiveFeatures(projections.orthogonal(jax.random.key(1), 4, 8))
answer: jax.Array = attention.kernel_attention(phi, x[0], x, x)
certificate = equivalence.verify(kernels.ExponentialKernel(), x[0], x, x)
holds: bool = certificate.holds
"""
# Each with the rule of mypy that it breaks.
WRONG = {
  'holds = certificate.hold': 'attr-defined',
  'verdict: int = equivalence.verify(phi, x[0], x, x).verdict': 'assignment',
  'equivalence.verify(phi, x[0], x, x, learning_rat=1.0)': 'call-arg',
  'attention.kernel_attention(1.0, x[0], x, x)': 'arg-type',
}


def test_the_newest_entry_of_the_changelog_is_the_version():
  found = re.findall(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
  assert found[0] == iclcl_jax.__version__


@pytest.mark.slow
def test_mypy_of_a_user_knows_the_types_of_the_library(tmp_path):
  pytest.importorskip('mypy', reason='mypy is missing: the extra dev has it')
  (tmp_path / 'right.py').write_text(USER)
  (tmp_path / 'wrong.py').write_text(USER + '\n'.join(WRONG))
  # A folder of PYTHONPATH counts as installed: without `py.typed` all is Any.
  result = subprocess.run(
    [sys.executable, '-m', 'mypy', '--config-file=', 'right.py', 'wrong.py'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  first = USER.count('\n') + 1
  expected = [
    (f'wrong.py:{first + line}', rule)
    for line, rule in enumerate(WRONG.values())
  ]
  found = re.findall(r'^(.+?:\d+): error: .*\[(.+)\]', result.stdout, re.M)
  assert found == expected, result.stdout + result.stderr
