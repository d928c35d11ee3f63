"""Tokenizers that GGUF files carry: vocabulary, merges or scores, and rules."""

import bisect
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from iclcl_jax.pretrained import _chat
from iclcl_jax.pretrained._config import Config
from iclcl_jax.pretrained._gguf_entries import USE_DIRECTORY
from iclcl_jax.pretrained._reading import import_reader
from iclcl_jax.pretrained.gguf import GGUFFile
from iclcl_jax.pretrained.tokenizer import Tokenizer

_PREFIX = 'tokenizer.ggml.'
# Kinds of tokens in a GGUF file.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# What changes no text, or is read for one kind of tokenizer alone.
_HARMLESS = re.compile(r'pre|scores|merges|token_type_count|\w+_token_ids?')
# Where byte-level tokenizers cut text before pairs are merged.
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE, _AFTER = r'[^\r\n\p{L}\p{N}]?', r'|\s*[\r\n]+|\s+(?!\S)|\s+'
_SIGNS = r'| ?[^\s\p{L}\p{N}]+[\r\n]*'
_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
_WORDS += r'(?!\S)|\s+'
_THREE = _SHORT + '|' + _BEFORE + r'\p{L}+|\p{N}{1,3}' + _SIGNS + _AFTER
_ONE = _THREE.replace('{1,3}', '')
_CASED = (
  f'{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?'
  r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*' + _AFTER
)


class _Cut(NamedTuple):
  """How text is cut: by each pattern in turn."""

  patterns: Sequence[str]
  composed: bool = False  # Whether characters are composed (NFC) before.
  whole: bool = False  # Whether words of the vocabulary need no merges.
  bos: bool = False  # Whether texts begin with a token, if nothing says it.


_CUTS = {
  'gpt-2': _Cut([_WORDS]),
  'olmo': _Cut([_WORDS], composed=True),
  'smollm': _Cut([r'\p{N}', _WORDS]),
  'llama-bpe': _Cut([_THREE], whole=True, bos=True),
  'smaug-bpe': _Cut([_THREE], whole=True),
  'dbrx': _Cut([_THREE]),
  'qwen2': _Cut([_ONE], composed=True),
  'gpt-4o': _Cut([_CASED], whole=True),
  'tekken': _Cut(
    [_CASED.replace(f'{_SHORT}?', '').replace('{1,3}', '')],
    whole=True,
    bos=True,
  ),
}
_CUTS |= {'llama3': _CUTS['llama-bpe'], 'deepseek-r1-qwen': _CUTS['qwen2']}


def tokenizer_of(file: GGUFFile) -> Tokenizer:
  """Builds the tokenizer that a GGUF file carries; `ValueError` for others.

  Byte-level BPE (`gpt2`; Sennrich et al., arXiv:1508.07909), or that of
  SentencePiece with bytes for characters that are in no piece (`llama`; Kudo &
  Richardson, arXiv:1808.06226), or words cut into the longest pieces that the
  vocabulary has (`bert`; Devlin et al., arXiv:1810.04805).
  """
  tokenizers = import_reader('tokenizers')
  stated = file.metadata.items()
  entries = Config(
    {k.removeprefix(_PREFIX): v for k, v in stated if k.startswith(_PREFIX)},
    label=lambda name: f'{file.path}: the metadata {_PREFIX + name!r}',
    fix=USE_DIRECTORY,
  )
  kind = entries.choice('model', {k: k for k in ('gpt2', 'llama', 'bert')})
  cut = entries.choice('pre', _CUTS) if kind == 'gpt2' else None
  tokens = _list(entries, 'tokens', str)
  gemma = str(file.metadata.get('general.architecture')).startswith('gemma')
  if gemma:  # Its runs of spaces stand there as spaces.
    tokens = ['▁' * len(t) if t and not t.strip(' ') else t for t in tokens]
  kinds = _list(entries, 'token_type', int, len(tokens))
  if kind == 'bert':
    tokens = [_piece(*pair) for pair in zip(tokens, kinds, strict=True)]
  vocabulary = {token: index for index, token in enumerate(tokens)}
  if len(vocabulary) != len(tokens):
    found = f'a list of {len(tokens)} tokens of which {len(vocabulary)} differ'
    raise entries.error('tokens', found, 'each once')
  make, options = tokenizers.models.BPE, dict[str, Any]()
  if kind == 'bert':
    make = tokenizers.models.WordPiece
    options = {'unk_token': tokens[_named(entries, tokens, 'unknown')]}
  elif cut:
    merges = [tuple(m.split(' ')) for m in _list(entries, 'merges', str)]
    options = {'merges': merges, 'ignore_merges': cut.whole}
  else:
    scores = _list(entries, 'scores', float, len(tokens))
    if gemma:  # Its merges follow the order of the pieces, not their scores.
      scores = [-float(index) for index in range(len(tokens))]
    options = {'merges': _merges(vocabulary, scores), 'byte_fallback': True}
    unknown = tokens[kinds.index(_UNKNOWN)] if _UNKNOWN in kinds else None
    options |= {'fuse_unk': True, 'unk_token': unknown}
  try:
    model = make(vocab=vocabulary, **options)
  except Exception as error:  # The package raises plain exceptions.
    raise ValueError(
      f'{file.path}: vocabulary and merges of the tokenizer disagree '
      f'({error}). Convert the model again.'
    ) from error
  backend = tokenizers.Tokenizer(model)
  if kind == 'bert':
    _cut_words(entries, backend, tokenizers, cased='A' in vocabulary)
  elif cut:
    composed = entries.switch('normalizer.nfc', cut.composed)
    _cut_bytes(backend, tokenizers, cut._replace(composed=composed))
  else:
    _cut_pieces(backend, tokenizers, entries.switch('add_space_prefix', True))
  _add_special(backend, tokenizers, tokens, kinds)
  bos, eos = cut.bos if cut else True, kind == 'bert'
  _add_ends(entries, backend, tokenizers, tokens, bos=bos, eos=eos)
  named = {
    f'{ours}_token': entries.get(f'{theirs}_token_id')
    for ours, theirs in _chat.GGUF_NAMES.items()
  }
  fields = entries.fields.items()
  harmless = [k for k, v in fields if not v or _HARMLESS.fullmatch(k)]
  entries.check_all_read(harmless=harmless)
  known = {n: tokens[i] for n, i in named.items() if i in range(len(tokens))}
  source = file.metadata.get('tokenizer.chat_template')
  return Tokenizer(backend, _chat.from_settings(source, known))


def _list(entries, name: str, kind: type, size: int | None = None) -> list:
  found = entries.get(name)
  fits = isinstance(found, list) and all(type(x) is kind for x in found)
  if not fits or len(found) != (size or len(found)):
    raise entries.error(name, found, f'a list of {size or ""} {kind.__name__}')
  return found


def _piece(token: str, kind: int) -> str:
  """Marks what goes on a word by `##`; the file marks what begins one."""
  if kind in (_UNKNOWN, _CONTROL):
    return token
  return token[1:] if token.startswith('▁') else f'##{token}'


def _cut_words(entries, backend, tokenizers, *, cased: bool) -> None:
  """Lets words be cut; capitals stay if the vocabulary is `cased`."""
  lower = entries.switch('normalizer.lowercase', not cased)
  backend.normalizer = tokenizers.normalizers.BertNormalizer(
    lowercase=lower,
    strip_accents=entries.switch('normalizer.strip_accents', lower),
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.decoder = tokenizers.decoders.WordPiece()
  entries.switch('add_sep_token', True)  # Between the texts of a pair.


def _cut_bytes(backend, tokenizers, cut: _Cut) -> None:
  """Lets a BPE read bytes, the space before a word belonging to it."""
  parts, regex = tokenizers.pre_tokenizers, tokenizers.Regex
  splits = [parts.Split(regex(p), 'isolated') for p in cut.patterns]
  to_bytes = parts.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = parts.Sequence([*splits, to_bytes])
  backend.decoder = tokenizers.decoders.ByteLevel()
  if cut.composed:
    backend.normalizer = tokenizers.normalizers.NFC()


def _cut_pieces(backend, tokenizers, space_before: bool) -> None:
  """Lets a BPE read pieces of SentencePiece, which writes `▁` for a space."""
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  spaces = [normalizers.Replace(' ', '▁')]
  texts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  if space_before:
    spaces.insert(0, normalizers.Prepend('▁'))
    texts.append(decoders.Strip(' ', 1, 0))
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence(texts)


def _merges(
  vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Returns the pairs that make pieces, those of the best pieces first."""
  pairs, sizes = [], sorted({len(piece) for piece in vocabulary} - {0})
  for piece, index in vocabulary.items():
    for n in sizes[: bisect.bisect_left(sizes, len(piece))]:
      left, right = piece[:n], piece[n:]
      if left in vocabulary and right in vocabulary:
        lengths = -len(left), -len(right)
        rank = -scores[index], *lengths, index, vocabulary[left]
        pairs.append((rank, (left, right)))
  return [pair for _, pair in sorted(pairs)]


def _add_special(backend, tokenizers, tokens, kinds) -> None:
  make = functools.partial(tokenizers.AddedToken, normalized=False)
  pairs = list(zip(tokens, kinds, strict=True))
  backend.add_special_tokens(
    [make(t, special=True) for t, k in pairs if k in (_UNKNOWN, _CONTROL)]
  )
  backend.add_tokens(
    [make(t) for t, k in pairs if k == _USER_DEFINED and t.strip('▁')]
  )


def _named(entries, tokens, name: str, other: str | None = None) -> int:
  """Reads the id of a token that texts need, by either of two names."""
  default = entries.get(f'{other}_token_id')
  index = entries.count(f'{name}_token_id', default, least=0)
  if index >= len(tokens):
    expected = f'an id below {len(tokens)}, for texts need it'
    raise entries.error(f'{name}_token_id', index, expected)
  return index


def _add_ends(
  entries, backend, tokenizers, tokens, *, bos: bool, eos: bool
) -> None:
  template, special = ['$A'], []
  ends = ('bos', 'cls', 0, bos), ('eos', 'seperator', 2, eos)
  for name, other, place, default in ends:
    if entries.switch(f'add_{name}_token', default):
      index = _named(entries, tokens, name, other)
      template.insert(place, tokens[index])
      special.append((tokens[index], index))
  if special:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=special
    )
