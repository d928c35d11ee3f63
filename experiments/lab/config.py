"""Options of an experiment, with their ranges, and the flags made of them.

A config is a frozen dataclass of options::

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(lab.Config):
    num_seeds: int = lab.option(10, 'independent runs', minimum=5)
    sizes: tuple[int, ...] = lab.option((15, 31), 'lengths', distinct=True)

What a value may be stands in its option; what several values may be together is
checked in the method `check`.
"""

import dataclasses
import functools
import math
import operator
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from absl import flags

_BOUNDS = {
  'minimum': ('>=', operator.ge),
  'above': ('>', operator.gt),
  'maximum': ('<=', operator.le),
  'below': ('<', operator.lt),
}
TINY = 'a run of seconds: small numbers wherever no flag gives one'
_NAMES = {int: 'an integer', float: 'a finite number', str: 'a text'}


class Rule(TypedDict, total=False):
  """What a value may be: bounds and choices hold for each item of a tuple."""

  minimum: float
  maximum: float
  above: float
  below: float
  choices: tuple[Any, ...]
  min_items: int  # Of a tuple, which may also be `distinct` or `increasing`.
  distinct: bool
  increasing: bool
  at_most: str  # Another option.
  more_than: str  # One that it must exceed, or all of its items.
  multiple_of: str | int  # Another option, or a number.
  among: str  # Another option, a list that holds it, or all of its items.


def option(
  default: Any, text: str, *, tiny: Any = None, **rule: Unpack[Rule]
) -> Any:
  """A field of a config: its default, its help text and what it may be.

  The default is a bool, int, float, str, or a tuple of one of these. `tiny` is
  the value in a tiny run, if it is another one.
  """
  if unknown := rule.keys() - Rule.__annotations__.keys():
    raise TypeError(f'option has no rule {sorted(unknown)}.')
  metadata = {'help': text, 'rule': rule, 'tiny': tiny}
  return dataclasses.field(default=default, metadata=metadata)


count = functools.partial(option, minimum=1)  # A number of something, or some.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Base of all configs: checks every field against its option."""

  if TYPE_CHECKING:  # A question reads the options of its experiment.

    def __getattr__(self, name: str) -> Any: ...

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check_field(field, getattr(self, field.name))
    for field in dataclasses.fields(self):
      self._compare(field.name, getattr(self, field.name), field.metadata)
    self.check()

  def _compare(self, name: str, value: Any, metadata: Any) -> None:
    """Checks a value against other options that its own names."""
    rule = metadata.get('rule', {})
    own = value if isinstance(value, tuple) else (value,)
    if most := rule.get('at_most'):
      bound = getattr(self, most)
      self.require(value <= bound, name, f'at most {most}, {bound}')
    if least := rule.get('more_than'):
      items = getattr(self, least)
      bound = max(items) if isinstance(items, tuple) else items
      self.require(value > bound, name, f'more than {least}, {bound}')
    if unit := rule.get('multiple_of'):
      size = getattr(self, unit) if isinstance(unit, str) else unit
      words = f'{unit}, {size}' if isinstance(unit, str) else size
      holds = all(x % size == 0 for x in own)
      self.require(holds, name, f'a multiple of {words}')
    if others := rule.get('among'):
      found = getattr(self, others)
      self.require({*own} <= {*found}, name, f'among {others}, {found}')

  def check(self) -> None:
    """Checks what options say together; raises `ValueError`."""

  def require(self, holds: bool, name: str, what: str) -> None:
    """Raises unless `holds`, naming an option, its value and what it may be."""
    if not holds:
      raise ValueError(f'{name} is {getattr(self, name)!r}; expected {what}.')

  @classmethod
  def tiny(cls) -> Self:
    """Settings of a run of seconds, for tests and `reproduce --fast`."""
    fields = {x.name: x.metadata.get('tiny') for x in dataclasses.fields(cls)}
    return cls(**{name: x for name, x in fields.items() if x is not None})


def _kind(default: Any) -> type:
  """The type of a value, or of the items of a list."""
  items = default if isinstance(default, tuple) else (default,)
  return type(items[0]) if items else str


def _check_field(field: dataclasses.Field, value: Any) -> None:
  rule = field.metadata.get('rule')
  if rule is None:
    return
  default: Any = field.default
  kind, is_list = _kind(default), isinstance(default, tuple)
  for item in value if is_list else (value,):
    _check_item(field.name, item, kind, rule)
  if not is_list:
    return
  problem, count = '', rule.get('min_items', 1)
  if len(value) < count:
    problem = f'at least {count} {"value" if count == 1 else "values"}'
  elif rule.get('increasing') and list(value) != sorted(set(value)):
    problem = 'increasing values'
  elif rule.get('distinct') and len(set(value)) < len(value):
    problem = 'distinct values'
  if problem:
    example = ','.join(map(str, default))
    raise ValueError(
      f'{field.name} is {",".join(map(str, value)) or "empty"}; expected '
      f'{problem}, such as {example}.'
    )


def _check_item(name: str, value: Any, kind: type, rule: Rule) -> None:
  if 'choices' in rule:
    if value not in rule['choices']:
      choices = ' or '.join(map(repr, rule['choices']))
      raise ValueError(f'{name} is {value!r}; expected {choices}.')
  elif kind in (int, float) and not _fits(value, kind, rule):
    raise ValueError(f'{name} is {value!r}; expected {_range(kind, rule)}.')


def _fits(value: Any, kind: type, rule: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  if (kind is int and not isinstance(value, int)) or not math.isfinite(value):
    return False
  own = [(rule[k], holds) for k, (_, holds) in _BOUNDS.items() if k in rule]
  return all(holds(value, bound) for bound, holds in own)


def _range(kind: type, rule: Any) -> str:
  bounds = [
    f'{sign} {rule[key]:g}' for key, (sign, _) in _BOUNDS.items() if key in rule
  ]
  return ' '.join([_NAMES[kind], ' and '.join(bounds)]).rstrip()


def describe(field: dataclasses.Field) -> str:
  """The help text of an option, with what it may be and its default."""
  text, rule = field.metadata.get('help', field.name), field.metadata['rule']
  default, kind = field.default, _kind(field.default)
  items = default if isinstance(default, tuple) else (default,)
  parts = []
  if 'choices' in rule:
    parts.append(' or '.join(map(str, rule['choices'])))
  elif kind in (int, float) and _range(kind, rule) != _NAMES[kind]:
    parts.append(_range(kind, rule).removeprefix(f'{_NAMES[kind]} '))
  if isinstance(default, tuple):
    order = [name for name in ('increasing', 'distinct') if rule.get(name)]
    least = rule.get('min_items', 1)
    said = ['comma-separated', *order[:1], f'at least {least}']
    parts.append(', '.join(said if least > 1 else said[:-1]))
  for words in ('at_most', 'more_than', 'multiple_of', 'among'):
    if words in rule:
      parts.append(f'{words.replace("_", " ")} {rule[words]}')
  shown = ','.join(map(str, items))
  shown = 'all' if items and items == rule.get('choices') else shown
  if isinstance(default, str):
    shown = repr(default)
  parts.append(f'default {shown.lower() if kind is bool else shown}')
  return f'{text} ({"; ".join(parts)})'


_PARSERS: dict[type, Any] = {
  int: flags.IntegerParser,
  float: flags.FloatParser,
  str: flags.ArgumentParser,
}


def define_flags(config_type: type[Config]) -> None:
  """Defines one absl flag for each option, and `--tiny`."""
  flags.DEFINE_bool('tiny', False, TINY)
  for field in dataclasses.fields(config_type):
    default, text = field.default, field.metadata.get('help', field.name)
    if isinstance(default, bool):
      flags.DEFINE_bool(field.name, default, text)
      continue
    parser = _PARSERS[_kind(default)]()
    writer: Any = flags.ArgumentSerializer()
    if isinstance(default, tuple):
      parser, writer = _ListParser(parser), flags.CsvListSerializer(',')
    flags.DEFINE(parser, field.name, default, text, serializer=writer)


def from_flags(config_type: type[Config]) -> Config:
  """Makes a config of the flags that `define_flags` has defined."""
  defined = [flags.FLAGS[x.name] for x in dataclasses.fields(config_type)]
  start = config_type.tiny() if flags.FLAGS.tiny else config_type()
  given = {flag.name: flag.value for flag in defined if flag.present}
  return dataclasses.replace(start, **given)


class _ListParser(flags.ArgumentParser):
  def __init__(self, item_parser: flags.ArgumentParser):
    super().__init__()
    self._item_parser = item_parser
    self.syntactic_help = 'comma-separated'

  def parse(self, argument: Any) -> tuple[Any, ...]:
    if not isinstance(argument, str):
      return tuple(argument)
    items = [item.strip() for item in argument.split(',') if item.strip()]
    return tuple(map(self._item_parser.parse, items))

  def flag_type(self) -> str:
    return 'comma-separated list'
