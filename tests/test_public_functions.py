"""Every public function has a user besides the tests.

A user is other code of the library, an experiment, a notebook, or an example
that is executed: in the README, in `docs/`, or in the docstring of something
else. A function's own docstring is no user.
"""

import ast
import builtins
import doctest
import functools
import importlib
import inspect
import json
import pathlib
import pkgutil
import re

import pytest

import iclcl_jax
from iclcl_jax import coefficients, moments, types
from tests import examples

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def modules():
  """The modules of the library by dotted name, private ones too."""
  names = ['iclcl_jax'] + [
    info.name
    for info in pkgutil.walk_packages(iclcl_jax.__path__, 'iclcl_jax.')
  ]
  return {name: importlib.import_module(name) for name in names}


def is_function(member):
  """Whether it is a function, compiled by `jax.jit` or not."""
  return (
    callable(member)
    and not inspect.isclass(member)
    and inspect.isfunction(inspect.unwrap(member))
    and inspect.unwrap(member).__module__.startswith('iclcl_jax')
  )


@functools.cache
def public_functions():
  """Identity of every public function, with its shortest public name."""
  found = {}
  for name, module in modules().items():
    if any(part.startswith('_') for part in name.split('.')):
      continue
    public = getattr(module, '__all__', None) or [
      member
      for member, value in vars(module).items()
      if not member.startswith('_')
      and f'{getattr(value, "__module__", None)}.'.startswith(f'{name}.')
    ]
    for member in public:
      value = getattr(module, member)
      if is_function(value):
        label = f'{name}.{member}'.removeprefix('iclcl_jax.')
        found.setdefault(inspect.unwrap(value), []).append(label)
  return {fn: min(labels, key=len) for fn, labels in found.items()}


class Uses(ast.NodeVisitor):
  """Collects the public functions that a piece of code refers to.

  Names that a function binds itself hide those of the module around it.
  """

  def __init__(self, namespace, tree):
    self.namespace, self.hidden, self.found = dict(namespace), [], set()
    for node in ast.walk(tree):
      if isinstance(node, ast.Import | ast.ImportFrom):
        self.namespace |= imported(node)
    self.visit(tree)

  def visit_FunctionDef(self, node):
    """Looks into a function, whose own name is no use of it."""
    for decorator in node.decorator_list:
      self.visit(decorator)
    bound = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    for child in ast.walk(node):
      if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
        bound.add(child.id)
      elif isinstance(child, ast.FunctionDef) and child is not node:
        bound.add(child.name)
    own = {node.name} if not self.hidden else set()
    self.hidden.append(bound | own)
    for child in [node.args, *node.body]:
      self.visit(child)
    self.hidden.pop()

  def visit_Lambda(self, node):
    """Looks into a lambda."""
    self.hidden.append({arg.arg for arg in node.args.args})
    self.generic_visit(node)
    self.hidden.pop()

  def visit_Name(self, node):
    """Notes a name that is read."""
    if isinstance(node.ctx, ast.Load):
      self.note(self.value_of(node))

  def visit_Attribute(self, node):
    """Notes `module.name`, or looks on to the left."""
    value = self.value_of(node)
    self.note(value)
    if value is None:
      self.generic_visit(node)

  def value_of(self, node):
    if isinstance(node, ast.Name):
      if any(node.id in names for names in self.hidden):
        return None
      return self.namespace.get(node.id)
    if isinstance(node, ast.Attribute):
      owner = self.value_of(node.value)
      return getattr(owner, node.attr, None) if owner is not None else None
    return None

  def note(self, value):
    if is_function(value):
      self.found.add(inspect.unwrap(value))


def imported(node):
  """What an import binds, of the library alone."""
  if isinstance(node, ast.Import):
    return {
      alias.asname or alias.name.split('.')[0]: modules()[
        alias.name if alias.asname else 'iclcl_jax'
      ]
      for alias in node.names
      if alias.name in modules()
    }
  source = modules().get(node.module or '')
  if source is None:
    return {}
  return {
    alias.asname or alias.name: getattr(source, alias.name, None)
    or modules().get(f'{node.module}.{alias.name}')
    for alias in node.names
  }


def examples_in(text):
  """The source of the examples in a text, as one program."""
  examples = doctest.DocTestParser().get_examples(text or '')
  return ''.join(example.source for example in examples)


def docstrings(tree):
  """Name and docstring of a module and of all that it defines."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  for node in ast.walk(tree):
    if isinstance(node, kinds):
      yield getattr(node, 'name', ''), ast.get_docstring(node)


def uses_of_library():
  for module in modules().values():
    source = pathlib.Path(module.__file__).read_text()
    tree = ast.parse(source)
    yield Uses(vars(module), tree).found
    for name, text in docstrings(tree):
      own = inspect.unwrap(getattr(module, name, None) or len)
      known = vars(module) | examples.NAMES
      yield Uses(known, ast.parse(examples_in(text))).found - {own}


def uses_of_others():
  for path in sorted((ROOT / 'experiments').rglob('*.py')):
    yield Uses({}, ast.parse(path.read_text())).found
  for path in sorted((ROOT / 'colabs').glob('*.ipynb')):
    cells = json.loads(path.read_text())['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    source = re.sub(r'(?m)^(\s*)[%!].*', r'\1pass', '\n'.join(code))
    yield Uses({}, ast.parse(source)).found
  for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]:
    if 'generated' not in path.parts:
      yield Uses({}, ast.parse(examples_in(path.read_text()))).found


def uses_of_forms():
  """The methods of `types.Form`, called on what `form_of` returns."""
  for name in types.Form.__annotations__:
    if not name.startswith('_'):
      for form in (moments, coefficients):
        yield {inspect.unwrap(getattr(form, name))}


@functools.cache
def used():
  return set().union(*uses_of_library(), *uses_of_others(), *uses_of_forms())


def test_every_public_function_has_a_user():
  alone = sorted(
    name for fn, name in public_functions().items() if fn not in used()
  )
  assert not alone, f'{len(alone)} public functions have no user: {alone}'


def test_the_list_is_that_of_the_library():
  names = public_functions().values()
  assert len(names) > 150
  assert {'attention.softmax_attention', 'dual.one_step'} <= set(names)
  assert not any(hasattr(builtins, name) for name in names)


@pytest.mark.parametrize(
  ('source', 'is_use'),
  [
    ('from iclcl_jax import attention\nattention.softmax_attention(q)', True),
    ('import iclcl_jax\niclcl_jax.attention.softmax_attention', True),
    ('import iclcl_jax.attention as a\nmap(a.softmax_attention, x)', True),
    ('from iclcl_jax.attention import softmax_attention as s\ns()', True),
    ('from iclcl_jax.attention import softmax_attention', False),
    ('from iclcl_jax import attention as a\ndef f(a): a.softmax_attention', 0),
    ('from iclcl_jax.attention import softmax_attention as s\ns = 1', False),
    ('attention.softmax_attention', False),
  ],
)
def test_a_use_is_seen(source, is_use):
  found = Uses({}, ast.parse(source)).found
  wanted = inspect.unwrap(iclcl_jax.attention.softmax_attention)
  assert (wanted in found) == bool(is_use)
