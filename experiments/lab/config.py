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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from absl import flags

_BOUNDS = {
  'minimum': ('>=', operator.ge),
  'above': ('>', operator.gt),
  'maximum': ('<=', operator.le),
  'below': ('<', operator.lt),
}
TINY = 'a run of seconds: small numbers wherever no flag gives one'
_NAMES = {int: 'an integer', float: 'a finite number', str: 'a text'}


def option(
  default: Any,
  text: str,
  *,
  minimum: float | None = None,
  maximum: float | None = None,
  above: float | None = None,
  below: float | None = None,
  choices: Sequence[Any] | None = None,
  min_items: int = 1,
  distinct: bool = False,
  increasing: bool = False,
  at_most: str | None = None,
  more_than: str | None = None,
  multiple_of: str | int | None = None,
  tiny: Any = None,
) -> Any:
  """A field of a config: its default, its help text and what it may be.

  The default is a bool, int, float, str, or a tuple of one of these; bounds and
  choices hold for each item of a tuple, `min_items`, `distinct` and
  `increasing` for the tuple. `at_most` and `multiple_of` name other options,
  `more_than` one that it must exceed, or all of its items. `tiny` is the value
  in a tiny run, if it is another one.
  """
  rule = {
    'minimum': minimum,
    'maximum': maximum,
    'above': above,
    'below': below,
    'choices': None if choices is None else tuple(choices),
    'min_items': min_items,
    'distinct': distinct,
    'increasing': increasing,
    'at_most': at_most,
    'more_than': more_than,
    'multiple_of': multiple_of,
  }
  return dataclasses.field(
    default=default, metadata={'help': text, 'rule': rule, 'tiny': tiny}
  )


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
    if most := metadata.get('rule', {}).get('at_most'):
      bound = getattr(self, most)
      self.require(value <= bound, name, f'at most {most}, {bound}')
    if least := metadata.get('rule', {}).get('more_than'):
      items = getattr(self, least)
      bound = max(items) if isinstance(items, tuple) else items
      self.require(value > bound, name, f'more than {least}, {bound}')
    if unit := metadata.get('rule', {}).get('multiple_of'):
      size = getattr(self, unit) if isinstance(unit, str) else unit
      words = f'{unit}, {size}' if isinstance(unit, str) else size
      self.require(value % size == 0, name, f'a multiple of {words}')

  def check(self) -> None:
    """Checks what options say together; raises `ValueError`."""

  def require(self, holds: bool, name: str, expected: str) -> None:
    """Raises unless `holds`, naming an option, its value and what it may be."""
    if not holds:
      raise ValueError(
        f'{name} is {getattr(self, name)!r}; expected {expected}.'
      )

  @classmethod
  def tiny(cls) -> Self:
    """Settings of a run of seconds, for tests and `reproduce --fast`."""
    fields = {x.name: x.metadata.get('tiny') for x in dataclasses.fields(cls)}
    return cls(**{name: x for name, x in fields.items() if x is not None})


def _check_field(field: dataclasses.Field, value: Any) -> None:
  rule = field.metadata.get('rule')
  if rule is None:
    return
  if not isinstance(field.default, tuple):
    _check_item(field.name, value, type(field.default), rule)
    return
  kind = type(field.default[0]) if field.default else str
  for item in value:
    _check_item(field.name, item, kind, rule)
  problem = ''
  if len(value) < rule['min_items']:
    count = rule['min_items']
    problem = f'at least {count} {"value" if count == 1 else "values"}'
  elif rule['increasing'] and list(value) != sorted(set(value)):
    problem = 'increasing values'
  elif rule['distinct'] and len(set(value)) < len(value):
    problem = 'distinct values'
  if problem:
    example = ','.join(map(str, field.default))
    raise ValueError(
      f'{field.name} is {",".join(map(str, value)) or "empty"}; expected '
      f'{problem}, such as {example}.'
    )


def _check_item(name: str, value: Any, kind: type, rule: Any) -> None:
  if rule['choices'] is not None:
    if value not in rule['choices']:
      choices = ' or '.join(map(repr, rule['choices']))
      raise ValueError(f'{name} is {value!r}; expected {choices}.')
    return
  if kind in (int, float) and not _fits(value, kind, rule):
    raise ValueError(f'{name} is {value!r}; expected {_range(kind, rule)}.')


def _fits(value: Any, kind: type, rule: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  if (kind is int and not isinstance(value, int)) or not math.isfinite(value):
    return False
  return all(
    rule[key] is None or holds(value, rule[key])
    for key, (_, holds) in _BOUNDS.items()
  )


def _range(kind: type, rule: Any) -> str:
  bounds = [
    f'{sign} {rule[key]:g}'
    for key, (sign, _) in _BOUNDS.items()
    if rule[key] is not None
  ]
  return ' '.join([_NAMES[kind], ' and '.join(bounds)]).rstrip()


def _items(rule: Any) -> str:
  """How many items a list has and which order, in words."""
  order = [name for name in ('increasing', 'distinct') if rule[name]]
  count = [f'at least {rule["min_items"]}'] if rule['min_items'] > 1 else []
  return ', '.join(['comma-separated', *order[:1], *count])


def describe(field: dataclasses.Field) -> str:
  """The help text of an option, with what it may be and its default."""
  text, rule = field.metadata.get('help', field.name), field.metadata['rule']
  default = field.default
  items = default if isinstance(default, tuple) else (default,)
  kind = type(items[0]) if items else str
  parts = []
  if rule['choices'] is not None:
    parts.append(' or '.join(map(str, rule['choices'])))
  elif kind in (int, float) and _range(kind, rule) != _NAMES[kind]:
    parts.append(_range(kind, rule).removeprefix(f'{_NAMES[kind]} '))
  if isinstance(default, tuple):
    parts.append(_items(rule))
  for words in ('at_most', 'more_than', 'multiple_of'):
    if rule[words]:
      parts.append(f'{words.replace("_", " ")} {rule[words]}')
  shown = ','.join(map(str, items))
  shown = 'all' if items and items == rule['choices'] else shown
  if isinstance(default, str):
    shown = repr(default)
  parts.append(f'default {shown.lower() if kind is bool else shown}')
  return f'{text} ({"; ".join(parts)})'


def define_flags(config_type: type[Config]) -> None:
  """Defines one absl flag for each option, and `--tiny`."""
  flags.DEFINE_bool('tiny', False, TINY)
  for field in dataclasses.fields(config_type):
    default, text = field.default, field.metadata.get('help', field.name)
    define: Any = {
      bool: flags.DEFINE_bool,
      int: flags.DEFINE_integer,
      float: flags.DEFINE_float,
      str: flags.DEFINE_string,
    }.get(type(default))
    if define is not None:
      define(field.name, default, text)
    elif isinstance(default, tuple):
      item_parser: Any = {
        int: flags.IntegerParser,
        float: flags.FloatParser,
        str: flags.ArgumentParser,
      }[type(default[0]) if default else str]()
      flags.DEFINE(
        _ListParser(item_parser),
        field.name,
        default,
        text,
        serializer=flags.CsvListSerializer(','),
      )
    else:
      raise TypeError(f'{field.name}: no flag for {type(default).__name__}')


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
