"""States survive the disk bit for bit, or say what is wrong."""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import dual, features, kernels, storage
from iclcl_jax.types import DualState, KernelDualState

DTYPES = ['float64', 'float32', 'bfloat16', 'float16']


def make_state(kind, dtype='float32'):
  rng = np.random.default_rng(0)
  shapes = {
    DualState: ((3, 8), (8,), (8,)),
    KernelDualState: ((5, 4), (5, 3), (5,)),
  }[kind]
  return kind(
    *(jnp.asarray(rng.normal(size=shape), jnp.dtype(dtype)) for shape in shapes)
  )


KINDS = pytest.mark.parametrize('kind', [DualState, KernelDualState])


def bits(array):
  return np.asarray(array).tobytes()


@KINDS
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_state_comes_back_bit_for_bit(tmp_path, kind, dtype):
  state = make_state(kind, dtype)
  state = state._replace(mass=state.mass.at[0].set(jnp.nan))
  path = tmp_path / 'state.npz'
  storage.save(path, state)
  loaded = storage.load(str(path))
  assert type(loaded) is kind
  for a, b in zip(state[:3], loaded[:3], strict=True):
    assert isinstance(b, jax.Array)
    assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))
  assert os.listdir(tmp_path) == ['state.npz']


@pytest.mark.parametrize(
  'phi', [features.EluPlusOneFeatures(), kernels.ExponentialKernel()]
)
def test_a_loaded_state_predicts_and_learns_on(tmp_path, phi):
  x, v = jnp.eye(4), jnp.ones((4, 2))
  state = dual.zero_shot(phi, x[:2], v[:2])
  storage.save(tmp_path / 'state', state)  # No suffix is added.
  loaded = storage.load(tmp_path / 'state')
  states = [dual.one_step(phi, s, x[2:], v[2:]) for s in (state, loaded)]
  found, expected = (dual.predict(phi, s, x[0]) for s in states)
  np.testing.assert_array_equal(found, expected)


@KINDS
def test_empty_states_and_heads_are_kept(tmp_path, kind):
  state = make_state(kind)
  heads = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), state)
  empty = jax.tree.map(lambda x: x[:0] if kind is KernelDualState else x, state)
  for one in (heads, empty):
    storage.save(tmp_path / 'state.npz', one)
    loaded = storage.load(tmp_path / 'state.npz')
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, one)


def test_numpy_alone_reads_the_file(tmp_path):
  state = make_state(DualState)
  storage.save(tmp_path / 'state.npz', state)
  with np.load(tmp_path / 'state.npz') as archive:
    np.testing.assert_array_equal(archive['mass'], state.mass)
    assert str(archive['kind']) == 'DualState'


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'state.npz'
  state = make_state(DualState)
  storage.save(path, state)
  honest = np.savez

  def interrupted(file, *args, **arrays):
    honest(file, *args, **arrays)
    raise OSError('no space left')

  monkeypatch.setattr(np, 'savez', interrupted)
  with pytest.raises(OSError, match='no space left'):
    storage.save(path, jax.tree.map(lambda x: 2 * x, state))
  assert os.listdir(tmp_path) == ['state.npz']
  assert bits(storage.load(path).mass) == bits(state.mass)


def test_a_missing_file_stays_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'gone\.npz'):
    storage.load(tmp_path / 'gone.npz')
  with pytest.raises(FileNotFoundError, match='no folder'):
    storage.save(tmp_path / 'gone' / 'state.npz', make_state(DualState))


@pytest.mark.parametrize('kept', [0, 1, 100, 0.5, 0.98])
def test_a_truncated_file_is_named(tmp_path, kept):
  path = tmp_path / 'state.npz'
  storage.save(path, make_state(DualState))
  content = path.read_bytes()
  size = int(kept * len(content)) if isinstance(kept, float) else kept
  path.write_bytes(content[:size])
  with pytest.raises(ValueError, match=r'state\.npz .*truncated'):
    storage.load(path)


def test_a_flipped_bit_is_named(tmp_path):
  path = tmp_path / 'state.npz'
  state = make_state(DualState)
  storage.save(path, state)
  content = bytearray(path.read_bytes())
  where = content.index(bits(state.weights)) + 5
  content[where] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(ValueError, match=r'state\.npz .*corrupt.*CRC'):
    storage.load(path)


def test_foreign_files_are_named(tmp_path):
  path = tmp_path / 'other'
  for write in (
    lambda: path.write_text('hello'),
    lambda: path.write_bytes(b'PK\x03\x04' + bytes(50)),
  ):
    write()
    with pytest.raises(ValueError, match='other is no readable state'):
      storage.load(path)
  with open(path, 'wb') as file:
    np.save(file, np.ones(3))
  with pytest.raises(ValueError, match='other is no readable state'):
    storage.load(path)
  with open(path, 'wb') as file:
    np.savez(file, weights=np.ones(3))
  with pytest.raises(ValueError, match='other holds no state'):
    storage.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('note.txt', 'hello')
  with pytest.raises(ValueError, match='other holds no'):
    storage.load(path)


def test_folders_and_other_compressions_are_named(tmp_path):
  with pytest.raises(IsADirectoryError):
    storage.load(tmp_path)
  with pytest.raises(IsADirectoryError):
    storage.save(tmp_path, make_state(DualState))
  path = tmp_path / 'state.npz'
  storage.save(path, make_state(DualState))
  content = bytearray(path.read_bytes())
  for signature, offset in ((b'PK\x03\x04', 8), (b'PK\x01\x02', 10)):
    start = content.find(signature)
    while start >= 0:
      content[start + offset] = 99  # A method that the reader does not know.
      start = content.find(signature, start + 1)
  path.write_bytes(content)
  with pytest.raises(ValueError, match='no readable state'):
    storage.load(path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mass': None}, "lacks the array 'mass'"),
    ({'mass.dtype': None}, r"lacks the array 'mass\.dtype'"),
    ({'kind': np.asarray('Other')}, "holds a 'Other'; expected one of"),
    ({'format': np.asarray('iclcl_jax.state.9')}, 'holds no state'),
    ({'mass': np.ones(7, np.float32)}, 'arrays of the DualState disagree'),
    ({'mass': np.ones((8, 1), np.float32)}, 'arrays of the DualState disag'),
    ({'weights': np.float32(1)}, 'arrays of the DualState disagree'),
    ({'mass.dtype': np.asarray('float7')}, "declared as 'float7'"),
    ({'mass.dtype': np.asarray('int32')}, 'expected floating-point'),
    ({'kind': np.asarray('KernelDualState')}, "lacks the array 'keys'"),
  ],
)
def test_a_wrong_content_is_named(tmp_path, change, message):
  path = tmp_path / 'state.npz'
  storage.save(path, make_state(DualState))
  with np.load(path) as archive:
    contents = dict(archive) | change
  np.savez(path, **{k: v for k, v in contents.items() if v is not None})
  with pytest.raises(ValueError, match=message):
    storage.load(path)


def test_only_concrete_consistent_states_are_saved(tmp_path):
  path, state = tmp_path / 'state.npz', make_state(DualState)
  for bad, message in (
    ((1, 2, 3), 'state is a tuple; expected a DualState'),
    (state._replace(mass=jnp.ones(3)), 'arrays of the DualState disagree'),
    (state._replace(mass=jnp.ones(8, int)), 'expected floating-point'),
  ):
    with pytest.raises(ValueError, match=message):
      storage.save(path, bad)
  with pytest.raises(ValueError, match='DualState is traced'):
    jax.jit(lambda state: storage.save(path, state))(state)
  assert os.listdir(tmp_path) == []


def test_float64_is_never_halved_in_silence(tmp_path):
  path = tmp_path / 'state.npz'
  storage.save(path, make_state(DualState, 'float64'))
  jax.config.update('jax_enable_x64', False)
  try:
    with pytest.raises(ValueError, match='jax_enable_x64'):
      storage.load(path)
  finally:
    jax.config.update('jax_enable_x64', True)
