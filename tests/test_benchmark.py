"""The benchmark compares like with like, and says what it did not measure."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  benchmark,
  benchmark_modified,
  benchmark_peers,
  benchmark_tools,
  pretraining,
)
from iclcl_jax import attention

TINY = benchmark.Config(
  length=64,
  growth=2,
  num_heads=2,
  dim=8,
  num_features=16,
  num_demonstrations=300,
  layer_features=32,
  num_steps=4,
  num_seeds=2,
  matmul_size=32,
  prompt_length=0,
  repetitions=2,
)


def _goals(summary):
  return {row['what']: row for row in summary['goals']}


def _missing(*names):
  return any(importlib.util.find_spec(name) is None for name in names)


def test_every_goal_is_measured_or_named_as_not_measured(tmp_path, capsys):
  summary = benchmark.run(TINY, tmp_path)

  assert json.loads((tmp_path / 'summary.json').read_text()) == summary
  goals = _goals(summary)
  assert len(goals) == 21
  for what, row in goals.items():
    needs = ['torch'] if 'torch' in what else []
    needs += ['torch', 'performer_pytorch'] if 'performer' in what else []
    if _missing(*needs):
      assert row['measured'] == benchmark_tools.NOT_MEASURED
    else:
      assert row['measured'] >= 0
  markdown = (tmp_path / 'table.md').read_text()
  printed = capsys.readouterr().out
  for what in goals:
    assert what in markdown
    assert what in printed


def test_without_peers_their_rows_say_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setitem(sys.modules, 'performer_pytorch', None)

  goals, timings = benchmark._attention(TINY)

  rows = [goal.row() for goal in goals if 'torch' in goal.what]
  assert len(rows) == 3
  for row in rows:
    assert row['measured'] == 'not measured: install iclcl_jax[bench]'
    assert row['met'] is None
  assert not any('torch' in row['call'] for row in timings)


def test_another_config_in_the_same_workdir_is_an_error(tmp_path):
  benchmark.harness.open_workdir(TINY, tmp_path)
  with pytest.raises(ValueError, match='length'):
    benchmark.run(dataclasses.replace(TINY, length=65), tmp_path)


def test_calls_take_turns_and_medians_count(monkeypatch):
  clock, order = [0.0], []
  monkeypatch.setattr(benchmark_tools.time, 'perf_counter', lambda: clock[0])
  # Every timed call follows one that is not.
  durations = {
    'a': iter([7.0, 1.0, 7.0, 9.0, 7.0, 2.0]),
    'b': iter([0.0, 5.0, 0.0, 5.0, 0.0, 80.0]),
  }

  def call(name):
    order.append(name)
    clock[0] += next(durations[name])

  seconds = benchmark_tools.measure(
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
  row = benchmark_tools.Goal('x', value, 2, at_least).row()
  assert row['met'] is met
  assert benchmark_tools.Goal('x', 2.0, 2, at_least).row()['met']


def test_the_rate_of_the_matrix_product_is_one():
  rows = benchmark._timings(TINY, 'group', {'matmul': 0.25, 'x': 0.5}, {'x': 8})
  rates = {row['call']: row['of_matmul_rate'] for row in rows}
  assert rates == {'matmul': 1.0, 'x': 8 * 0.25 / (0.5 * 2 * 32**3)}


def test_performer_computes_the_same_attention():
  if _missing('torch', 'performer_pytorch'):
    arrays = np.zeros((3, 1, 2, 4), np.float32)
    assert benchmark_peers.performer(*arrays, arrays[0, 0]) is None
    return
  arrays, phi = benchmark._heads(TINY, 64), benchmark._feature_map(TINY)
  host = [np.asarray(array) for array in arrays]
  peers = {
    benchmark_peers.performer: attention.stream_kernel_attention,
    benchmark_peers.causal_performer: attention.causal_kernel_attention,
  }
  for peer, ours in peers.items():
    theirs = peer(*host, np.asarray(phi.projection))()
    expected = jax.vmap(lambda *head, ours=ours: ours(phi, *head))(*arrays)
    # The peer adds 1e-4 to every feature.
    np.testing.assert_allclose(theirs, expected, atol=5e-3)


def test_exact_peer_computes_causal_softmax_attention():
  arrays = benchmark._heads(TINY, 6)
  call = benchmark_peers.causal_softmax(*map(np.asarray, arrays))
  if _missing('torch'):
    assert call is None
    return
  queries, keys, values = (array[1] for array in arrays)
  expected = attention.softmax_attention(queries[4], keys[:5], values[:5])
  np.testing.assert_allclose(call()[1, 4], expected, atol=1e-6)


def test_training_peer_takes_the_same_steps():
  run = pretraining.init_run(jax.random.key(0), num_features=32)
  prompts = pretraining.draw_prompts(
    jax.random.key(1), jnp.arange(20), lambda _: run.task_matrix, 15
  )
  call = benchmark._peer_loop(run.params, run.phi, prompts)
  if _missing('torch'):
    assert call is None
    return
  _, losses = pretraining.train(
    run.params, run.phi, prompts, benchmark.LEARNING_RATE
  )
  np.testing.assert_allclose(call(), losses, rtol=1e-3)
  np.testing.assert_array_equal(call(), call())


def test_plain_rows_are_plain_attention():
  head = [array[0] for array in benchmark._heads(TINY, 64)]
  phi = benchmark._feature_map(TINY)
  exact = jax.vmap(attention.softmax_attention, in_axes=(0, None, None))
  np.testing.assert_allclose(
    benchmark_modified.softmax_in_blocks(*head), exact(*head), rtol=1e-4
  )
  np.testing.assert_allclose(
    benchmark_modified.features_in_blocks(phi, *head),
    attention.stream_kernel_attention(phi, *head),
    rtol=1e-4,
    atol=1e-6,
  )


def test_modified_rows_are_compared_with_the_attention_they_modify():
  phi = benchmark._feature_map(TINY)
  for rows, bound in (
    (benchmark_modified.linear(phi), 1.3),
    (benchmark_modified.quadratic(phi), 2),
  ):
    seconds = {name: 1.0 + i for i, name in enumerate(rows.calls)}
    for name, plain in rows.plain.items():
      assert name.split(',')[0] == plain.split(',')[0]
      (goal,) = (
        x
        for x in benchmark_modified.goals(rows, seconds)
        if x.what.startswith(f'{name}:')
      )
      assert goal.value == seconds[name] / seconds[plain]
      assert goal.bound == bound
      assert not goal.at_least
