"""The harness of the experiments: flags, workdir, checkpoints, files."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import blocks, harness

ROOT = pathlib.Path(__file__).parents[1]

# A random walk whose steps depend on the step number alone. DIE_AFTER kills
# the process, without a chance to clean up, after so many blocks.
SCRIPT = """
import dataclasses, json, os, signal, sys
import jax, tqdm
from experiments import blocks, harness

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  num_steps: int = harness.option(6, 'steps of the walk')
  scale: float = 1.0
  name: str = 'walk'
  sizes: tuple[int, ...] = (1, 2)
  doomed: bool = False

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f'num_steps is {self.num_steps}; expected >= 1.')

def run(config, workdir):
  folder = harness.open_workdir(config, workdir)
  root = jax.random.key(0)

  def step(x, number):
    x = x + jax.random.normal(jax.random.fold_in(root, number)) * config.scale
    return x, x

  x, path = harness.scan_blocks(
    step, jax.numpy.zeros(()), config.num_steps, block_size=2,
    checkpoints=folder / 'checkpoints', description='walk')
  print('config', json.dumps(dataclasses.asdict(config)))
  return harness.write_summary(
    folder, {'x': x, 'path': path, 'holds': not config.doomed})

blocks = []
update = tqdm.tqdm.update
def counted(self, n):
  blocks.append(n)
  if len(blocks) == int(os.environ.get('DIE_AFTER', 0)):
    os.kill(os.getpid(), signal.SIGKILL)
  return update(self, n)
tqdm.tqdm.update = counted

if __name__ == '__main__':
  harness.run_binary(Config, run)
"""


@dataclasses.dataclass(frozen=True)
class Config:
  num_steps: int = 3
  sizes: tuple[int, ...] = (1, 2)
  rate: float = 0.5


@pytest.fixture(scope='module')
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp('script') / 'walk.py'
  path.write_text(SCRIPT)
  return str(path)


def _command(script, *arguments, die_after=0):
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'DIE_AFTER': str(die_after),
    'JAX_PLATFORMS': 'cpu',
  }
  return subprocess.run(
    [sys.executable, script, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_flags_become_the_config(script, tmp_path):
  result = _command(
    script,
    f'--workdir={tmp_path}',
    '--num_steps=1',
    '--scale=0.5',
    '--name=stroll',
    '--sizes=4,5,6',
  )
  assert result.returncode == 0, result.stderr
  printed = json.loads(result.stdout.split('config ')[1])
  expected = {
    'num_steps': 1,
    'scale': 0.5,
    'name': 'stroll',
    'sizes': [4, 5, 6],
    'doomed': False,
  }
  assert printed == expected
  assert json.loads((tmp_path / 'config.json').read_text()) == expected
  # The checkpointer's own log is not part of the output.
  assert 'checkpoint_manager.py' not in result.stderr


def test_a_false_summary_is_a_failing_exit_code(script, tmp_path):
  result = _command(
    script, f'--workdir={tmp_path}', '--num_steps=1', '--doomed=true'
  )
  assert result.returncode == 1
  assert (tmp_path / 'summary.json').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--num_step=3'], "Unknown command line flag 'num_step'"),
    (['--num_steps=many'], 'many'),
    (['--sizes=1,x'], 'sizes'),
    (['--num_steps=0'], 'error: num_steps is 0; expected >= 1.'),
    (['stray'], 'unknown arguments: stray'),
  ],
)
def test_bad_command_line_ends_in_a_message(
  script, tmp_path, arguments, message
):
  result = _command(script, f'--workdir={tmp_path}', *arguments)
  assert result.returncode != 0
  assert message in result.stderr + result.stdout
  assert 'Traceback' not in result.stderr


def test_workdir_is_required(script):
  result = _command(script)
  assert result.returncode != 0
  assert '--workdir' in result.stderr + result.stdout


def test_killed_run_resumes_to_the_same_bits(script, tmp_path):
  whole = _command(script, f'--workdir={tmp_path / "whole"}')
  assert whole.returncode == 0, whole.stderr
  killed = _command(script, f'--workdir={tmp_path / "killed"}', die_after=2)
  assert killed.returncode == -signal.SIGKILL
  assert not (tmp_path / 'killed' / 'summary.json').exists()
  resumed = _command(script, f'--workdir={tmp_path / "killed"}')
  assert resumed.returncode == 0, resumed.stderr
  # The bar starts where the killed run stopped: nothing was computed twice.
  assert '2/6' in resumed.stderr
  texts = [
    (tmp_path / name / 'summary.json').read_text()
    for name in ('whole', 'killed')
  ]
  assert texts[0] == texts[1]


def _walk(folder, num_steps=6, block_size=2):
  root = jax.random.key(1)

  def step(carry, number):
    x = carry['x'] + jax.random.normal(
      jax.random.fold_in(root, number), (3,), carry['x'].dtype
    )
    return {'x': x}, (x, jnp.sum(x))

  return harness.scan_blocks(
    step,
    {'x': jnp.zeros(3, jnp.float32)},
    num_steps,
    block_size=block_size,
    checkpoints=folder,
    description='walk',
  )


def test_blocks_do_not_change_a_scan(tmp_path):
  carry, (path, sums) = _walk(tmp_path / 'a', num_steps=5, block_size=2)
  other, (other_path, _) = _walk(tmp_path / 'b', num_steps=5, block_size=5)
  assert path.shape == (5, 3)
  assert sums.shape == (5,)
  np.testing.assert_array_equal(path, other_path)
  np.testing.assert_array_equal(carry['x'], other['x'])


def test_interrupted_loop_resumes_to_the_same_bits(tmp_path, monkeypatch):
  import tqdm

  whole, (path, _) = _walk(tmp_path / 'whole')
  update, blocks = tqdm.tqdm.update, []

  def interrupt(self, n):
    blocks.append(n)
    if len(blocks) == 3:
      raise KeyboardInterrupt
    return update(self, n)

  with monkeypatch.context() as patch:
    patch.setattr(tqdm.tqdm, 'update', interrupt)
    with pytest.raises(KeyboardInterrupt):
      _walk(tmp_path / 'part')
  saved = {p.name for p in (tmp_path / 'part').iterdir() if p.name.isdigit()}
  assert saved == {'4'}
  carry, (resumed_path, _) = _walk(tmp_path / 'part')
  np.testing.assert_array_equal(path, resumed_path)
  np.testing.assert_array_equal(whole['x'], carry['x'])


def test_finished_loop_is_restored_without_computing(tmp_path):
  first, (path, _) = _walk(tmp_path)
  again, (same, _) = _walk(tmp_path)
  np.testing.assert_array_equal(path, same)
  np.testing.assert_array_equal(first['x'], again['x'])


def test_damaged_checkpoint_names_the_folder_to_delete(tmp_path):
  folder = tmp_path / 'walk'
  _walk(folder, num_steps=2)
  damaged = 0
  for file in (folder / '2').rglob('*'):
    if file.is_file() and file.name != '_CHECKPOINT_METADATA':
      file.write_bytes(b'')
      damaged += 1
  assert damaged
  with pytest.raises(ValueError, match=r'cannot be read.*delete that folder'):
    _walk(folder, num_steps=4)


def test_damaged_numbers_of_a_checkpoint_are_noticed(tmp_path, monkeypatch):
  folder = tmp_path / 'walk'
  _walk(folder, num_steps=2)
  monkeypatch.setattr(blocks, '_checksum', lambda tree: np.uint32(0))
  with pytest.raises(ValueError, match=r'cannot be read.*delete that folder'):
    _walk(folder, num_steps=4)


def test_workdir_that_is_a_file_is_named(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(ValueError, match=r"workdir is '.*file', which cannot be"):
    harness.open_workdir(Config(), file)


def test_other_config_in_the_workdir_names_the_field(tmp_path):
  harness.open_workdir(Config(), tmp_path)
  harness.open_workdir(Config(), tmp_path)
  with pytest.raises(ValueError, match=r'rate=0\.5, this one has rate=0\.25'):
    harness.open_workdir(Config(rate=0.25), tmp_path)
  with pytest.raises(ValueError, match=r'sizes=\[1, 2\], this one has'):
    harness.open_workdir(Config(sizes=(1, 2, 3)), tmp_path)


@pytest.mark.parametrize('content', [b'{"rate": ', b'[1]', b'\xff\xfe'])
def test_unreadable_config_is_named(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match=r'unreadable config\.json'):
    harness.open_workdir(Config(), tmp_path)


def test_workdir_is_left_clean_of_probes(tmp_path):
  harness.open_workdir(Config(), tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['config.json', 'figures']


def _write(path, text, *, fail):
  with harness.replacing(path) as temporary:
    temporary.write_text(text)
    if fail:
      raise RuntimeError


def test_replacing_keeps_the_old_file_on_failure(tmp_path):
  path = tmp_path / 'file.txt'
  _write(path, 'old', fail=False)
  with pytest.raises(RuntimeError):
    _write(path, 'half of the ne', fail=True)
  assert [file.name for file in tmp_path.iterdir()] == ['file.txt']
  assert path.read_text() == 'old'
  _write(path, 'new', fail=False)
  assert path.read_text() == 'new'


def test_json_has_no_nan_and_keeps_numbers():
  tree = {
    'nan': math.nan,
    'array': np.array([1.5, -np.inf]),
    'jax': jnp.arange(2),
    1: (True, None, 'text', np.float32(0.5)),
  }
  assert json.loads(harness.to_json(tree)) == {
    'nan': None,
    'array': [1.5, None],
    'jax': [0, 1],
    '1': [True, None, 'text', 0.5],
  }


def test_metrics_are_one_object_a_line(tmp_path):
  rows = [{'epoch': 1, 'loss': np.array([0.5])}, {'epoch': 2, 'loss': math.nan}]
  harness.write_metrics(tmp_path, rows)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'epoch': 1, 'loss': [0.5]},
    {'epoch': 2, 'loss': None},
  ]


def test_table_aligns_columns():
  text = harness.table([{'a': 'x', 'b': 1.23456}, {'a': 'long', 'b': 2}])
  assert text.splitlines() == ['a     b', '----  ----', 'x     1.23', 'long  2']


def test_interval_is_the_t_interval():
  samples = np.random.default_rng(0).normal(size=7)
  ours = harness.mean_interval(samples)
  low, high = scipy.stats.t.interval(
    0.95, 6, loc=np.mean(samples), scale=scipy.stats.sem(samples)
  )
  expected = {'mean': np.mean(samples), 'low': low, 'high': high}
  assert ours == pytest.approx(expected)
  with pytest.raises(ValueError, match='at least two'):
    harness.mean_interval([1.0])


def test_float64_on_host_computes_in_float64():
  with jax.enable_x64(False):
    assert jnp.ones(1).dtype == jnp.float32
    with harness.float64_on_host():
      assert jnp.ones(1).dtype == jnp.float64
    assert jnp.ones(1).dtype == jnp.float32


def test_quick_compilation_computes_the_same():
  x = jnp.linspace(0.0, 1.0, 7)
  fn = harness.compile_quickly(
    lambda x, power: jnp.sum(jnp.exp(x) ** power), static_argnames='power'
  )
  np.testing.assert_allclose(
    fn(x, power=2), np.sum(np.exp(2 * np.asarray(x))), rtol=1e-14
  )


def test_figures_are_written_as_png_and_svg(tmp_path):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  workdir = harness.open_workdir(Config(), tmp_path)
  figure, axis = plt.subplots()
  axis.plot([0, 1])
  harness.save_figure(workdir, 'line', figure)
  names = sorted(path.name for path in (tmp_path / 'figures').iterdir())
  assert names == ['line.png', 'line.svg']
  assert not plt.get_fignums()
