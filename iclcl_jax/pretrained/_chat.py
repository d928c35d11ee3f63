"""Chat templates of instruct models: conversations to prompts."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from iclcl_jax.pretrained._reading import import_reader

# Under which names templates ask for tokens, and what GGUF files call them.
GGUF_NAMES = {
  **{name: name for name in ('bos', 'eos', 'cls', 'mask')},
  **{'unk': 'unknown', 'sep': 'seperator', 'pad': 'padding'},
}
# A block around what the model says, which changes no prompt.
_GENERATION = re.compile(r'(\{%[-+]?\s*)(end)?generation\b')


class ChatTemplate(NamedTuple):
  source: str  # Jinja, as the files of the model have it.
  tokens: Mapping[str, str]  # What it may ask for, such as `bos_token`.


def from_settings(
  source: Any, settings: Mapping[str, Any]
) -> ChatTemplate | None:
  """Reads a template, or the default of a list of several; None without one."""
  if isinstance(source, list):
    named = [entry for entry in source if isinstance(entry, dict)]
    source = {e.get('name'): e.get('template') for e in named}.get('default')
  if not isinstance(source, str):
    return None
  tokens = {}
  for name in (f'{stem}_token' for stem in GGUF_NAMES):
    token = settings.get(name)
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str):
      tokens[name] = token
  return ChatTemplate(source, tokens)


def render(
  template: ChatTemplate,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool,
) -> str:
  """Writes a prompt in a sandbox, of plain copies: a template is no friend."""
  jinja2 = import_reader('jinja2')
  extensions = ['jinja2.ext.loopcontrols']
  environment = import_reader('jinja2.sandbox').ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=extensions
  )

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, indent=indent, **{'ensure_ascii': False} | options)

  environment.filters['tojson'] = to_json
  environment.globals |= {
    'raise_exception': refuse,
    'strftime_now': lambda form: datetime.datetime.now().strftime(form),
  }
  source = _GENERATION.sub(
    lambda tag: tag[1] + ('endif' if tag[2] else 'if true'), template.source
  )
  try:
    return environment.from_string(source).render(
      messages=json.loads(json.dumps(messages)),
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **template.tokens,
    )
  except Exception as error:  # Whatever the template does.
    raise ValueError(
      f"the model's chat template doesn't take these messages "
      f'({type(error).__name__}: {error}); expected dicts with role and '
      'content. Many templates want user and assistant to take turns, and some '
      'know no system.'
    ) from error
