"""The house: floors, light imports, documented doors, short modules."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import tokenize

import pytest

import iclcl_jax

ROOT = pathlib.Path(iclcl_jax.__file__).parent
# A module imports only from floors below it.
FLOORS = {
  'types': 0,
  '_validate': 0,
  '_door': 0,
  '_mesh': 0,
  '_program': 0,
  '_sameness': 0,
  '_pytree': 0,
  '_pair_series': 0,
  'precision': 0,
  'projections': 1,
  'kernels': 1,
  'tasks': 1,
  'storage': 1,
  'features': 2,
  'moments': 3,
  'coefficients': 3,
  'forms': 3,
  'budget': 3,
  'attention': 4,
  'finite_duals': 5,
  'losses': 4,
  'dual': 5,
  'bounds': 6,
  'modified': 6,
  'transformer': 6,
  'equivalence': 7,
  'layers': 8,
  'accounts': 8,
  'pretrained': 8,
}
# Doors know the vocabulary; the exact kernel borrows chunks and scales from the
# moments; `forms` chooses between the two.
SAME_FLOOR = {
  ('_door', 'types'),
  ('_door', '_validate'),
  ('_door', '_mesh'),
  ('_program', '_mesh'),
  ('_door', '_program'),
  ('_program', '_validate'),
  ('_program', '_sameness'),
  ('_pytree', '_sameness'),
  ('types', '_pytree'),
  ('coefficients', 'moments'),
  ('forms', 'moments'),
  ('forms', 'coefficients'),
}
HEAVY = ('flax', 'optax', 'absl', 'chex', 'matplotlib')
READERS = ('gguf', 'safetensors', 'tokenizers', 'torch', 'transformers')
MAX_LINES_OF_CODE = 320  # Docstrings and comments not counted.
FILES = sorted(ROOT.rglob('*.py'))
MODULES = [name for name in FLOORS if not name.startswith('_')]


def room_of(path):
  """The top-level module or package that a file belongs to."""
  first = path.relative_to(ROOT).parts[0]
  return first.removesuffix('.py')


def imported_rooms(tree, known):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split('.')
        if parts[0] == 'iclcl_jax':
          yield parts[1] if len(parts) > 1 else '__init__'
    elif isinstance(node, ast.ImportFrom):
      parts = (node.module or '').split('.')
      if node.level:
        yield 'a relative import'
      elif parts[0] == 'iclcl_jax' and len(parts) > 1:
        yield parts[1]
      elif parts[0] == 'iclcl_jax':
        for alias in node.names:
          yield alias.name if alias.name in known else '__init__'


def upward_imports(room, source):
  found = []
  for target in imported_rooms(ast.parse(source), FLOORS):
    below = FLOORS.get(target, 99) < FLOORS[room]
    if not (below or target == room or (room, target) in SAME_FLOOR):
      found.append(target)
  return found


def test_every_module_has_a_floor():
  rooms = {room_of(path) for path in FILES} - {'__init__'}
  assert rooms == set(FLOORS)


@pytest.mark.parametrize(
  'path', FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_go_down(path):
  if room_of(path) != '__init__':
    assert upward_imports(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
  'line',
  [
    'from iclcl_jax import dual',
    'from iclcl_jax.dual import one_step',
    'import iclcl_jax.dual',
    'import iclcl_jax',
    'from iclcl_jax import coefficients, dual',
    'from . import moments',
    'def f():\n  from iclcl_jax import dual',
  ],
)
def test_an_upward_import_is_seen(line):
  assert upward_imports('attention', line) != []
  assert upward_imports('attention', 'from iclcl_jax import moments') == []


def test_import_is_light():
  """No framework and no plots; flax comes with `iclcl_jax.layers` alone."""
  program = (
    'import sys, iclcl_jax\n'
    f'heavy = [name for name in {HEAVY + READERS} if name in sys.modules]\n'
    'assert not heavy, heavy\n'
    'import iclcl_jax.layers\n'
    'assert "flax" in sys.modules\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=ROOT.parent,
    check=False,
  )
  assert result.returncode == 0, result.stderr


def test_import_leaves_the_configuration_of_jax_alone():
  program = (
    'import jax\n'
    'before = dict(jax.config.values)\n'
    'import iclcl_jax\n'
    'assert before == dict(jax.config.values)\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=ROOT.parent,
    check=False,
  )
  assert result.returncode == 0, result.stderr


def public_members(module):
  names = getattr(module, '__all__', None) or [
    name
    for name, member in vars(module).items()
    if not name.startswith('_')
    and getattr(member, '__module__', '').startswith(module.__name__)
  ]
  for name in names:
    member = getattr(module, name)
    is_ours = getattr(member, '__module__', '').startswith('iclcl_jax')
    if is_ours and (inspect.isfunction(member) or inspect.isclass(member)):
      yield name, member


@pytest.mark.parametrize('name', MODULES)
def test_every_door_is_documented(name):
  module = importlib.import_module(f'iclcl_jax.{name}')
  assert module.__doc__
  missing = [
    member_name
    for member_name, member in public_members(module)
    if not member.__doc__ or member.__doc__.startswith(f'{member_name}(')
  ]
  assert missing == []


def test_all_modules_are_reached_from_the_package():
  reached = set(iclcl_jax.__all__)
  assert reached == {
    name
    for name in MODULES
    if name not in ('layers', 'moments', 'coefficients', 'forms')
  }
  assert all(hasattr(iclcl_jax, name) for name in reached)


def lines_of_code(path):
  """Lines with a token that is neither a comment nor a docstring."""
  tree = ast.parse(path.read_text())
  prose = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      prose |= set(range(node.lineno, node.end_lineno + 1))
  blank = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
  }
  code = set()
  with open(path, 'rb') as file:
    for token in tokenize.tokenize(file.readline):
      if token.type not in blank and token.start[0]:
        code |= set(range(token.start[0], token.end[0] + 1))
  return len(code - prose)


def test_modules_are_short():
  long = {
    str(path.relative_to(ROOT)): lines_of_code(path)
    for path in FILES
    if lines_of_code(path) > MAX_LINES_OF_CODE
  }
  assert long == {}


def test_no_check_of_user_input_by_assert():
  for path in FILES:
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), (
      path
    )


def test_nothing_selects_by_keyword_arguments():
  """No `**kwargs` in a public signature."""
  for name in MODULES:
    module = importlib.import_module(f'iclcl_jax.{name}')
    for member_name, member in public_members(module):
      if inspect.isfunction(member):
        kinds = {p.kind for p in inspect.signature(member).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, member_name
