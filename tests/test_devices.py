"""Sharded arrays, `shard_map` and explicit mesh axes, on eight CPU devices."""

import functools
import inspect
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from iclcl_jax import attention, dual, features, kernels, modified

ROOT = pathlib.Path(__file__).parents[1]
EXACT = 1e-12
PHI, KERNEL = features.EluPlusOneFeatures(), kernels.ExponentialKernel()
# Pieces of others, and what takes no arrays of tokens.
NOT_ALONE = {
  *('reader', 'divide', 'raise_others'),
  *('lowest_scores', 'highest_scores', 'random_choice'),
}
ACROSS_DEVICES = {'all_merge', 'prefix_merge'}


@functools.cache
def report():
  """What `on_devices` printed, by check: eight devices need a process."""
  command = [sys.executable, 'tests/on_devices.py']
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  'mode', ['shard_map', 'explicit rows', 'auto rows', 'explicit heads']
)
def test_sharded_tokens_change_no_result(mode):
  found = {k: v for k, v in report()['battery'].items() if k.startswith(mode)}
  assert len(found) >= 4
  wrong = {k: v for k, v in found.items() if not isinstance(v, float)}
  wrong |= {k: v for k, v in found.items() if k not in wrong and v > EXACT}
  assert not wrong


@pytest.mark.parametrize('module', [attention, dual, modified])
def test_every_function_of_tokens_is_in_the_battery(module):
  stem = module.__name__.removeprefix('iclcl_jax.')
  names = getattr(module, '__all__', None) or [
    name
    for name, value in vars(module).items()
    if str(getattr(value, '__module__', '')).startswith(module.__name__)
  ]
  public = {n for n in names if inspect.isfunction(getattr(module, n))}
  text = ' '.join(report()['battery'])
  missing = {n for n in public if f'{stem}.{n}' not in text and n not in text}
  assert missing <= NOT_ALONE | ACROSS_DEVICES


def test_what_devices_merge_is_what_one_device_computes():
  found = report()['across_devices']
  assert len(found) == 16
  assert not {k: v for k, v in found.items() if not v <= EXACT}


def test_prompts_that_devices_share_have_the_same_answers():
  found = report()['of_models']
  assert len(found) == 5
  assert not {k: v for k, v in found.items() if not v <= EXACT}


def test_collectives_of_a_step_do_not_grow_with_the_demonstrations():
  found = report()['num_bytes']
  assert set(found.values()) == {(2 + 2) * 6 * 8}  # (d_v + 2) R float64.


def test_two_hosts_hold_one_state():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  hosts = [
    subprocess.Popen(
      [sys.executable, 'tests/on_devices.py', str(process), str(port)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in hosts]
  for process, (output, errors) in zip(hosts, outputs, strict=True):
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])['on_two_hosts']
    assert found['devices'] == 4
    assert found['error'] < EXACT


@pytest.mark.parametrize(
  ('attend', 'size'),
  [
    (attention.softmax_attention, 'n'),
    (functools.partial(attention.kernel_attention, PHI), 'n'),
    (functools.partial(attention.stream_kernel_attention, PHI), '1024*n'),
    (functools.partial(attention.causal_kernel_attention, PHI), '64*n'),
    (functools.partial(attention.causal_kernel_attention, KERNEL), '64*n'),
  ],
)
def test_an_exported_program_takes_any_number_of_tokens(attend, size):
  (symbol,) = jax.export.symbolic_shape(size)
  rows = jax.random.normal(jax.random.key(0), (2048, 2))
  first = rows[0] if size == 'n' else rows
  shapes = [
    jax.ShapeDtypeStruct((symbol,) * (x.ndim - 1) + (2,), x.dtype)
    for x in (first, rows, rows)
  ]
  program = jax.export.export(jax.jit(attend))(*shapes)
  found = program.call(first, rows, rows)
  np.testing.assert_allclose(found, attend(first, rows, rows), rtol=1e-12)
