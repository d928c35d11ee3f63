"""The lab of the experiments: options, workdir, loops, statistics, files."""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from experiments import lab
from experiments.lab import (
  config as options,
  loops,
  models,
  runner,
  statistics,
  tables,
  workdir,
)
from tests import experiment_battery, pretrained_files as files

ROOT = pathlib.Path(__file__).parents[1]

# A random walk whose steps depend on the step number alone. DIE_AFTER kills
# the process, without a chance to clean up, after so many blocks.
SCRIPT = '''
"""A walk.

What it does.
"""

import dataclasses, os, signal, sys
from typing import NamedTuple
import jax, tqdm
from experiments import lab

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  num_steps: int = lab.option(6, 'steps of the walk', minimum=1, tiny=1)
  scale: float = lab.option(1.0, 'of a step', above=0)
  name: str = lab.option('walk', 'kind', choices=('walk', 'stroll'))
  sizes: tuple[int, ...] = lab.option((1, 2), 'sizes', distinct=True)
  doomed: bool = lab.option(False, 'whether it fails')

class Walk(NamedTuple):
  x: jax.Array
  path: jax.Array

def measure(config):
  root = jax.random.key(0)

  def step(x, number):
    x = x + jax.random.normal(jax.random.fold_in(root, number)) * config.scale
    return x, x

  return Walk(*lab.scan_blocks(
    step, jax.numpy.zeros(()), config.num_steps, block_size=2, name='walk'))

def summary(config, walk):
  return {**walk._asdict(), 'holds': not config.doomed}

def run(config, workdir):
  return lab.run(
    {'walk': lab.Part(measure, summary=summary)}, config, workdir,
    conclude=lambda *_: 'It walked.', closing=lambda summary: 'The end.')

blocks = []
update = tqdm.tqdm.update
def counted(self, n):
  blocks.append(n)
  if len(blocks) == int(os.environ.get('DIE_AFTER', 0)):
    os.kill(os.getpid(), signal.SIGKILL)
  return update(self, n)
tqdm.tqdm.update = counted

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
'''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  count: int = lab.option(3, 'a count', minimum=1, maximum=9)
  rate: float = lab.option(0.5, 'a rate', above=0, below=1)
  kind: str = lab.option('a', 'a kind', choices=('a', 'b'))
  fast: bool = lab.option(False, 'whether it is fast')
  sizes: tuple[int, ...] = lab.option(
    (1, 2), 'sizes', minimum=1, min_items=2, increasing=True
  )
  scales: tuple[float, ...] = lab.option((1.0,), 'scales', distinct=True)

  def check(self):
    self.require(self.count != 7, 'count', 'another number than 7')


@pytest.fixture(scope='module')
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp('script') / 'walk.py'
  path.write_text(SCRIPT)
  return str(path)


def _command(script, *arguments, die_after=0, home=None):
  environment = {
    'PYTHONPATH': str(ROOT),
    'DIE_AFTER': str(die_after),
    'JAX_PLATFORMS': 'cpu',
  }
  return subprocess.run(
    [sys.executable, script, *arguments],
    env=os.environ | environment | ({'HOME': str(home)} if home else {}),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'count': 0}, 'count is 0; expected an integer >= 1 and <= 9'),
    ({'count': 10}, 'count is 10; expected an integer >= 1 and <= 9'),
    ({'count': 2.0}, r'count is 2\.0; expected an integer'),
    ({'count': True}, 'count is True; expected an integer'),
    ({'count': 7}, 'count is 7; expected another number than 7'),
    ({'rate': 0.0}, r'rate is 0\.0; expected a finite number > 0 and < 1'),
    ({'rate': 1.0}, r'rate is 1\.0; expected a finite number > 0 and < 1'),
    ({'rate': math.nan}, 'rate is nan; expected a finite number'),
    ({'kind': 'c'}, "kind is 'c'; expected 'a' or 'b'"),
    ({'sizes': (1,)}, 'sizes is 1; expected at least 2 values, such as 1,2'),
    ({'sizes': (2, 1)}, 'sizes is 2,1; expected increasing values'),
    ({'sizes': (1, 1)}, 'sizes is 1,1; expected increasing values'),
    ({'sizes': (0, 1)}, 'sizes is 0; expected an integer >= 1'),
    ({'scales': ()}, 'scales is empty; expected at least 1 value'),
    ({'scales': (1.0, 1.0)}, r'scales is 1\.0,1\.0; expected distinct'),
  ],
)
def test_options_say_what_they_may_be(changes, message):
  class Experiment:
    Config = Config

  experiment_battery.check_refused(Experiment, changes, message)


def test_help_of_an_option_tells_range_and_default():
  texts = {x.name: options.describe(x) for x in dataclasses.fields(Config)}
  assert texts == {
    'count': 'a count (>= 1 and <= 9; default 3)',
    'rate': 'a rate (> 0 and < 1; default 0.5)',
    'kind': "a kind (a or b; default 'a')",
    'fast': 'whether it is fast (default false)',
    'sizes': (
      'sizes (>= 1; comma-separated, increasing, at least 2; default 1,2)'
    ),
    'scales': 'scales (comma-separated, distinct; default 1.0)',
  }


def test_help_prints_own_flags_first_and_succeeds(script):
  result = _command(script, '--help')
  assert result.returncode == 0
  lines = [
    line for line in result.stdout.splitlines() if line.startswith('  -')
  ]
  assert lines[:3] == ['  --workdir', '  --tiny', '  --num_steps']
  assert result.stdout.index('--doomed') < result.stdout.index('A walk.')


def test_flags_become_the_config_and_a_finished_run_answers(script, tmp_path):
  flags = ('--tiny', '--scale=0.5', '--name=stroll', '--sizes=4,5')
  # A workdir in the home folder, as people write it.
  result = _command(script, '--workdir=~/x', *flags, home=tmp_path)
  assert result.returncode == 0, result.stderr
  assert json.loads((tmp_path / 'x' / 'config.json').read_text()) == {
    'num_steps': 1,
    'scale': 0.5,
    'name': 'stroll',
    'sizes': [4, 5],
    'doomed': False,
  }
  # Neither a progress bar nor the checkpointer's log in a pipe.
  assert result.stderr == ''
  assert result.stdout.splitlines() == ['It walked.', '', 'The end.']
  again = _command(script, '--workdir=~/x', *flags, home=tmp_path, die_after=1)
  assert again.returncode == 0, again.stderr
  assert again.stdout == result.stdout


def test_a_false_summary_is_a_failing_exit_code(script, tmp_path):
  result = _command(
    script, f'--workdir={tmp_path}', '--num_steps=1', '--doomed=true'
  )
  assert result.returncode == 1
  assert (tmp_path / 'summary.json').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--workdir=DIR', '--num_step=3'], "Unknown command line flag 'num_step'"),
    (['--workdir=DIR', '--num_step=3'], '--help lists the flags'),
    (['--workdir=DIR', '--num_steps=many'], 'many'),
    (['--workdir=DIR', '--sizes=1,x'], 'sizes'),
    (['--workdir=DIR', '--num_steps=0'], 'error: num_steps is 0; expected an'),
    (['--workdir=DIR', 'stray'], 'error: unknown arguments: stray'),
    (['--workdir='], 'error: workdir is empty'),
    ([], 'error: workdir is empty'),
  ],
)
def test_bad_command_line_ends_in_a_message(
  script, tmp_path, arguments, message
):
  folder = tmp_path / 'out'
  arguments = [x.replace('DIR', str(folder)) for x in arguments]
  result = _command(script, *arguments)
  assert result.returncode != 0
  assert message in result.stderr + result.stdout
  assert 'Traceback' not in result.stderr
  assert not folder.exists()


def test_killed_run_resumes_to_the_same_bits(script, tmp_path):
  whole = _command(script, f'--workdir={tmp_path / "whole"}')
  assert whole.returncode == 0, whole.stderr
  killed = _command(script, f'--workdir={tmp_path / "killed"}', die_after=2)
  assert killed.returncode == -signal.SIGKILL
  assert not (tmp_path / 'killed' / 'summary.json').exists()
  # Two blocks are left at most: nothing is computed twice.
  resumed = _command(script, f'--workdir={tmp_path / "killed"}', die_after=3)
  assert resumed.returncode == 0, resumed.stderr
  a, b = (
    json.loads((tmp_path / name / 'summary.json').read_text())
    for name in ('whole', 'killed')
  )
  assert len(a['path']) == 6
  assert (a['x'], a['path']) == (b['x'], b['path'])


def _walk(folder, num_steps=6, block_size=2):
  root = jax.random.key(1)

  def step(root, carry, number):
    x = carry['x'] + jax.random.normal(
      jax.random.fold_in(root, number), (3,), carry['x'].dtype
    )
    return {'x': x}, (x, jnp.sum(x))

  carry = {'x': jnp.zeros(3, jnp.float32)}
  with loops.checkpoints_in(folder):
    return lab.scan_blocks(
      *(step, carry, num_steps),
      block_size=block_size,
      name='walk',
      shared=(root,),
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
  saved = {p.name for p in (tmp_path / 'part/walk').iterdir()}
  assert {name for name in saved if name.isdigit()} == {'4'}
  for _ in range(2):  # Resumed, then restored without computing.
    carry, (resumed_path, _) = _walk(tmp_path / 'part')
    np.testing.assert_array_equal(path, resumed_path)
    np.testing.assert_array_equal(whole['x'], carry['x'])


@pytest.mark.parametrize('what', ['files', 'numbers'])
def test_damaged_checkpoint_names_the_folder_to_delete(
  tmp_path, monkeypatch, what
):
  _walk(tmp_path, num_steps=2)
  files = [
    file
    for file in (tmp_path / 'walk' / '2').rglob('*')
    if file.is_file() and file.name != '_CHECKPOINT_METADATA'
  ]
  assert files
  if what == 'files':
    for file in files:
      file.write_bytes(b'')
  else:
    monkeypatch.setattr(loops, '_checksum', lambda tree: np.uint32(0))
  with pytest.raises(ValueError, match=r'cannot be read.*delete that folder'):
    _walk(tmp_path, num_steps=4)


def _run(parts, folder, config=None):
  return lab.run(parts, config or Config(), folder, conclude=lambda *_: 'Done.')


def test_parts_add_up_and_share_what_is_measured_once(tmp_path):
  import matplotlib.pyplot as plt

  calls = []

  @lab.once
  def shared(config):
    calls.append(config)
    return 2.0

  def part(name, holds):
    return lab.Part(
      shared,
      claims=lambda config, x: [
        lab.Claim(id=name, source='s', claim='c', statistic='t', estimate=x)
      ],
      figures=lambda config, x: [lab.Figure(name, plt.figure(), 'It is.')],
      summary=lambda config, x: {'both': {name: x}, 'holds': holds},
      metrics=lambda config, x: [{'part': name, 'x': np.array([x, math.nan])}],
      pages=lambda config, x: {f'{name}.txt': name},
    )

  parts = {'a': part('a', True), 'b': part('b', False)}
  summary = _run(parts, tmp_path)
  assert calls == [Config()]
  assert summary['both'] == {'a': 2.0, 'b': 2.0}
  assert summary['holds'] is False
  assert {'a', 'b', 'figures', 'total'} == set(summary['seconds'])
  assert [claim['value'] for claim in summary['claims']] == [2.0, 2.0]
  assert (tmp_path / 'b.txt').read_text() == 'b'
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[1]) == {'part': 'b', 'x': [2.0, None]}
  files = {path.name for path in (tmp_path / 'figures').iterdir()}
  assert files == {'a.png', 'a.svg', 'b.png', 'b.svg'}
  assert not plt.get_fignums()
  twice = {'a': parts['a'], 'c': parts['a']}
  with pytest.raises(ValueError, match="claim 'a' occurs twice"):
    _run(twice, tmp_path / 'twice')


def test_nothing_is_left_where_the_first_part_refuses(tmp_path):
  def refuse(config):
    raise ValueError('no')

  folder = tmp_path / 'out'
  for _ in range(2):
    with pytest.raises(ValueError, match='no'):
      _run({'a': lab.Part(refuse)}, folder)
    assert not folder.exists()
  folder.mkdir()
  (folder / 'mine.txt').touch()
  with pytest.raises(ValueError, match='no'):
    _run({'a': lab.Part(refuse)}, folder)
  assert (folder / 'mine.txt').exists()


def test_threads_keep_order_and_checkpoints(tmp_path):
  with loops.checkpoints_in(tmp_path):
    found = lab.in_threads(lambda i: (i, loops._FOLDER.get()), range(5))
  assert found == [(i, tmp_path) for i in range(5)]


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (Config(rate=0.25), r'rate=0\.5, this one has rate=0\.25'),
    (Config(sizes=(1, 2, 3)), r'sizes=\[1, 2\], this one has'),
  ],
)
def test_other_config_in_the_workdir_names_the_field(tmp_path, config, message):
  for _ in range(2):
    workdir.open_workdir(Config(), tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['config.json', 'figures']
  with pytest.raises(ValueError, match=message):
    workdir.open_workdir(config, tmp_path)


def test_workdir_that_is_a_file_is_named(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(ValueError, match=r"workdir is '.*file', which cannot be"):
    workdir.open_workdir(Config(), file)


@pytest.mark.parametrize('content', [b'{"rate": ', b'[1]', b'\xff\xfe'])
@pytest.mark.parametrize('name', ['config', 'summary'])
def test_unreadable_files_are_named(tmp_path, content, name):
  workdir.open_workdir(Config(), tmp_path)
  (tmp_path / f'{name}.json').write_bytes(content)
  with pytest.raises(ValueError, match=rf'unreadable {name}\.json'):
    _run({}, tmp_path)


def _write(path, text, *, fail):
  with workdir.replacing(path) as temporary:
    temporary.write_text(text)
    if fail:
      raise RuntimeError


def test_metrics_without_rows_are_an_empty_file(tmp_path):
  workdir.write_metrics(tmp_path, [])
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


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
    'estimate': lab.Estimate(1.0, 0.5, math.inf),
    1: (True, None, 'text', np.float32(0.5)),
  }
  assert json.loads(workdir.to_json(tree)) == {
    'nan': None,
    'array': [1.5, None],
    'jax': [0, 1],
    'estimate': {'mean': 1.0, 'low': 0.5, 'high': None},
    '1': [True, None, 'text', 0.5],
  }


def test_tables_as_text_csv_and_latex(tmp_path):
  rows = [{'a': 'x', 'b': 1.23456}, {'a': 'long_&', 'b': 2}]
  assert tables.text(rows).splitlines() == [
    'a       b',
    '------  ----',
    'x       1.23',
    'long_&  2',
  ]
  tables.write(tmp_path, 'numbers', rows)
  folder = tmp_path / 'tables'
  assert (folder / 'numbers.csv').read_text() == 'a,b\nx,1.23456\nlong_&,2\n'
  lines = (folder / 'numbers.tex').read_text().splitlines()
  assert lines[0] == r'\begin{tabular}{ll}'
  assert [r'x & 1.23 \\', r'long\_\& & 2 \\'] == lines[4:6]


def test_intervals_are_those_of_scipy():
  samples = np.random.default_rng(0).normal(size=7) + 5
  ours = statistics.mean(samples)
  low, high = scipy.stats.t.interval(
    0.95, 6, loc=np.mean(samples), scale=scipy.stats.sem(samples)
  )
  assert ours == pytest.approx((np.mean(samples), low, high))
  wider = statistics.mean(samples, num_comparisons=5)
  assert wider.high - wider.low > high - low
  with pytest.raises(ValueError, match='at least two'):
    statistics.mean([1.0])
  for count in (0, 3, 20):
    interval = scipy.stats.binomtest(count, 20).proportion_ci(method='exact')
    found = statistics.proportion(np.arange(20) < count)
    assert found == pytest.approx((count / 20, interval.low, interval.high))
  ratio = statistics.paired_ratio(2 * samples, samples)
  assert ratio == pytest.approx((2.0, 2.0, 2.0))
  assert statistics.geometric_mean([1.0, math.inf]).value == math.inf


@pytest.mark.parametrize('values', [20, 3])  # Without and with ties.
def test_rank_correlations_are_those_of_scipy(values):
  a, b = np.random.default_rng(0).integers(0, values, size=(2, 4, 12))
  for ours, theirs in (
    (statistics.rank_correlation, scipy.stats.spearmanr),
    (statistics.correlation, scipy.stats.pearsonr),
  ):
    expected = [theirs(*pair)[0] for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(ours(a, b), expected, atol=1e-12)
    assert ours(np.ones(4), np.arange(4.0)) == 0


@pytest.mark.parametrize(
  ('interval', 'verdict'),
  [
    ((0.2, 0.8), 'reproduced'),
    ((0.0, 1.0), 'reproduced'),
    ((-0.1, 0.5), 'undecided'),
    ((0.5, 1.1), 'undecided'),
    ((-1.0, 2.0), 'undecided'),
    ((1.1, 2.0), 'not reproduced'),
    ((-2.0, -0.1), 'not reproduced'),
    ((math.nan, 0.5), 'not reproduced'),
    ((0.5, math.nan), 'not reproduced'),
  ],
)
def test_a_claim_is_judged_by_its_whole_interval(interval, verdict):
  words = {'id': 'i', 'source': 's', 'claim': 'c', 'statistic': 't'}
  claim = lab.Claim(
    **words, estimate=lab.Estimate(0.5, *interval), at_least=0, at_most=1
  )
  assert claim.verdict == verdict
  own = dataclasses.replace(claim, verdict='undecided', more={'note': 'own'})
  record = own.to_dict('command')
  assert (record['verdict'], record['note']) == ('undecided', 'own')
  plain = lab.Claim(**words, estimate=2.0, at_most=1)
  assert (plain.verdict, plain.to_dict()['interval']) == (
    'not reproduced',
    None,
  )


def test_float64_on_host_computes_in_float64():
  with jax.enable_x64(False):
    assert jnp.ones(1).dtype == jnp.float32
    with lab.float64_on_host():
      assert jnp.ones(1).dtype == jnp.float64
    assert jnp.ones(1).dtype == jnp.float32


def test_quick_compilation_computes_the_same():
  x = jnp.linspace(0.0, 1.0, 7)
  fn = lab.compile_quickly(
    lambda x, power: jnp.sum(jnp.exp(x) ** power), static_argnames='power'
  )
  np.testing.assert_allclose(
    fn(x, power=2), np.sum(np.exp(2 * np.asarray(x))), rtol=1e-14
  )


def test_training_keeps_the_weights_of_gradient_descent():
  """Each batch is a target, drawn from its predecessor."""

  def loss(params, target):
    return jnp.sum((params - target) ** 2)

  def draw(target):
    return target + 1, target + 1

  records = loops.train(
    loss, jnp.zeros(2), draw, jnp.zeros(()), optax.sgd(0.25), num_steps=6,
    record_every=2,
  )  # fmt: skip
  expected = [0.0]
  for target in range(1, 7):  # Half of the way to each target.
    expected.append((expected[-1] + target) / 2)
  np.testing.assert_allclose(records[:, 0], expected[::2])
  np.testing.assert_allclose(records[:, 1], expected[::2])


def test_the_example_of_an_experiment_runs(tmp_path, monkeypatch):
  text = (ROOT / 'docs/architecture.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(list(filter(str.strip, code.splitlines()))) < 60
  (tmp_path / 'coins.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  coins = importlib.import_module('coins')
  summary = coins.run(coins.Config(), tmp_path / 'out')
  assert [claim['verdict'] for claim in summary['claims']] == ['reproduced']
  assert (tmp_path / 'out/figures/errors.png').exists()


def test_statements_are_claims_in_the_order_of_their_words():
  text = """
    b [s] first
      words | t
    a [s] second | t
    c [s] left out | t
    """
  found = {'a': lab.at_least(0, [1.0, 3.0]), 'b': lab.at_most(1, 2.0)}
  first, second = lab.statements('x-', text, found)
  assert (first.id, first.claim, first.verdict) == (
    'x-b',
    'first words',
    'not reproduced',
  )
  assert first.to_dict()['statistic'] == 't; at most 1'
  assert second.rule == 't, mean over seeds; at least 0'
  assert second.estimate == statistics.mean([1.0, 3.0])
  with pytest.raises(ValueError, match='no words for the claims d'):
    lab.statements('', text, {'d': lab.at_most(1, 0)})
  with pytest.raises(ValueError, match="'a b' is no claim; expected name"):
    lab.statements('', 'a b', {})
  assert lab.statements('', ' ', {}) == []


def test_tidy_rows_name_their_place_on_every_axis():
  rows = lab.tidy(
    {'k': 1}, {'x': np.arange(12).reshape(2, 3, 2)}, i='ab', j=range(3)
  )
  assert len(rows) == 6
  assert rows[5] | {'x': rows[5]['x'].tolist()} == {
    'k': 1,
    'i': 'b',
    'j': 2,
    'x': [10, 11],
  }


def test_a_recorded_command_has_the_flags_that_differ():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Options(lab.Config):
    sizes: tuple[int, ...] = lab.count((15, 31), 'lengths')
    name: str = lab.option('a', 'a text', tiny='b')

  plain = runner.command_of(Options())
  assert plain.endswith(' --workdir=DIR')
  command = runner.command_of(Options(sizes=(3, 4), name='b c'))
  assert command == f"{plain} --sizes=3,4 '--name=b c'"
  assert runner.command_of(Options.tiny()) == f'{plain} --tiny'


def test_a_model_may_be_read_in_part(tmp_path):
  """Its first blocks are those of the whole; more than there are is refused."""
  path = files.write_model(tmp_path / 'small', [' A', ' B'])
  whole, part = (
    models.load(models.Config(model_path=path, num_blocks=number)).model
    for number in (0, 1)
  )
  assert (whole.num_layers, part.num_layers) == (files.NUM_LAYERS, 1)
  np.testing.assert_array_equal(
    part.blocks.key.weight, whole.blocks.key.weight[:1]
  )
  with pytest.raises(ValueError, match='num_blocks is 9; expected at most 2'):
    models.load(models.Config(model_path=path, num_blocks=9))
