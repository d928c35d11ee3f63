"""The documentation site: `make docs`, strict, without a network.

Pages are the files of this folder. Four kinds are written here at each build,
into `generated/`: one page of the API for each public module, the notebooks of
`colabs/`, the tests that the equations name, and the files of the root.
Formulas are drawn by one file of MathJax, which a package brings.
"""

import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import sys

import yaml
from docutils import nodes
from sphinx import addnodes

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / 'generated'
sys.path.insert(0, str(ROOT))
# For the notebooks, which run in processes of their own.
os.environ['PYTHONPATH'] = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import iclcl_jax  # noqa: E402
from colabs import head  # noqa: E402

project = 'iclcl_jax'
author = copyright = 'The iclcl_jax developers'
release = version = iclcl_jax.__version__
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
]
html_theme = 'furo'
html_title = f'{project} {release}'
_mathjax = importlib.util.find_spec('sphinx-mathjax-offline')
mathjax_path = 'tex-svg.js'
html_static_path = [
  '_static',
  f'{_mathjax.submodule_search_locations[0]}/static/mathjax/{mathjax_path}',
]
html_css_files = ['site.css']
html_copy_source = False
exclude_patterns = ['_build']
suppress_warnings = ['mystnb.unknown_mime_type']

myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
nb_execution_mode = os.environ.get('NOTEBOOKS', 'cache')
nb_execution_cache_path = str(ROOT / '.cache/notebooks')
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

default_role = 'code'
add_module_names = False
python_maximum_signature_line_length = 60
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_custom_sections = [('Example', 'Examples')]
napoleon_use_ivar = True
napoleon_use_param = False  # `a, b: text` is one entry.
napoleon_attr_annotations = False


def modules():
  """The public modules by dotted name, in the order of the package."""
  names = [
    info.name
    for info in pkgutil.walk_packages(iclcl_jax.__path__, 'iclcl_jax.')
    if '._' not in info.name
  ]
  return {name: importlib.import_module(name) for name in names}


def public(name, module):
  """Names that a module defines, or exports from private modules below it."""
  aliases = getattr(module, '__annotations__', {})
  source = inspect.getsource(module)

  def is_own(member, value):
    home = f'{getattr(value, "__module__", None)}.'
    is_exported = f'{member} as {member}' in source
    below = (f'{name}.', 'iclcl_jax._') if is_exported else (f'{name}.',)
    return member in aliases or home.startswith(below)

  return [
    member
    for member, value in vars(module).items()
    if not member.startswith('_')
    and not inspect.ismodule(value)
    and is_own(member, value)
  ]


MODULES = modules()
PUBLIC = {
  f'{name}.{member}'
  for name, module in MODULES.items()
  for member in public(name, module)
}


def api_page(name, module):
  """A page of the API: the module's docstring, and every public name."""
  title = name.removeprefix('iclcl_jax.')
  lines = [title, '=' * len(title), '', f'.. automodule:: {name}', '']
  below = [n for n in MODULES if n.rpartition('.')[0] == name]
  if below:
    lines += ['.. toctree::', '   :maxdepth: 1', '']
    lines += [f'   {child}' for child in below] + ['']
  source = inspect.getsource(module)
  for member in public(name, module):
    value = getattr(module, member)
    alias = rf'((?:^# .*\n)*)^{member}: TypeAlias = (.+)'
    if found := re.search(alias, source, re.MULTILINE):
      comment = found[1].replace('# ', '').replace('\n', ' ')
      lines += [f'.. py:currentmodule:: {name}', '']
      lines += [f'.. py:type:: {member}', f'   :canonical: {found[2]}']
      lines += ['', f'   {comment}', '']
      continue
    kind = 'class' if inspect.isclass(value) else 'function'
    if not callable(value) or not hasattr(value, '__qualname__'):
      kind = 'data'
    lines += [f'.. auto{kind}:: {name}.{member}']
    if kind == 'class':
      lines += ['   :members:', '   :special-members: __call__']
      bases = value.__mro__[1:-1]
      if bases and all(x.__module__.startswith('iclcl_jax') for x in bases):
        lines += ['   :inherited-members:']
    if kind == 'data':
      lines += ['   :no-value:']
    lines += ['']
  return '\n'.join(lines)


def api_index():
  """The page that lists the modules, each with its first sentence."""
  lines = ['# API', '', '```{eval-rst}', '.. automodule:: iclcl_jax', '```', '']
  lines += ['| module | holds |', '|---|---|']
  top = [name for name in MODULES if name.count('.') == 1]
  for name, module in MODULES.items():
    if public(name, module):
      first = inspect.getdoc(module).split('\n\n')[0].replace('\n', ' ')
      first = re.sub(':math:`(.*?)`', r'$\1$', first).replace(':mod:', '')
      short = name.removeprefix('iclcl_jax.')
      lines += [f'| [{short}]({name}.rst) | {first} |']
  lines += ['', '```{toctree}', ':hidden:', '', *top, '```', '']
  return '\n'.join(lines)


def tests_page():
  """The tests that the equations name, in full."""
  named = re.findall(
    r'`(test_\w+)\.py::(test_\w+)`', (DOCS / 'equations.md').read_text()
  )
  lines = [
    ':orphan:',
    ':nosearch:',
    '',
    'The tests that the equations name',
    '=' * 33,
    '',
  ]
  for file, test in dict.fromkeys(named):
    lines += [f'.. _{file}-{test}:', '', test, '-' * len(test), '']
    lines += [f'In ``tests/{file}.py``:', '']
    lines += [f'.. literalinclude:: ../../tests/{file}.py']
    lines += [f'   :pyobject: {test}', '']
  return '\n'.join(lines)


def citation_page():
  """CITATION.cff as BibTeX."""
  cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text())

  def entry(kind, key, source, note):
    names = ' and '.join(
      f'{author["family-names"]}, {author["given-names"]}'
      if 'family-names' in author
      else f'{{{author["name"]}}}'
      for author in source['authors']
    )
    year = source.get('year') or source['date-released'].year
    fields = {'title': f'{{{source["title"]}}}', 'author': names}
    fields |= {'year': year, 'note': note}
    if 'YOUR_NAME' not in source['url']:
      fields['url'] = source['url']
    body = ''.join(f'  {k} = {{{v}}},\n' for k, v in fields.items())
    return f'@{kind}{{{key},\n{body}}}\n'

  own = cff | {'url': head.REPOSITORY}
  entries = [entry('misc', 'iclcl_jax', own, f'Version {release}')]
  for source in cff['references']:
    key = source['authors'][0]['family-names'].lower() + str(source['year'])
    entries += [entry('article', key, source, source['notes'])]
  return '# Citation\n\n{}\n\n```bibtex\n{}```\n'.format(
    cff['message'], '\n'.join(entries)
  )


def on_site(text):
  """A notebook whose links stay on the site, and which loads no badge."""
  text = text.replace(f'[![Open in Colab]({head.BADGE})]', '[Open in Colab]')
  text = text.replace(f'{head.REPOSITORY}/blob/main/docs/', '../')
  return re.sub(rf'(next: .*?\]\(){head.COLAB}/blob/main/colabs/', r'\1', text)


def generate(app):
  """Writes the pages that are made of other files, where they have changed."""
  pages = {f'api/{name}.rst': api_page(name, m) for name, m in MODULES.items()}
  pages |= {'api/index.md': api_index(), 'tests.rst': tests_page()}
  pages |= {'citation.md': citation_page()}
  index = (DOCS / 'index.md').read_text()
  for path in [*ROOT.glob('[BC]*.md'), *ROOT.glob('colabs/*.ipynb')]:
    text = on_site(path.read_text()).replace('](docs/', '](../')
    text = re.sub(r'\]\([BC]\w+\.md', lambda link: link[0].lower(), text)
    is_listed = f'generated/{path.stem.lower()}' in index
    if path.suffix == '.md' and not is_listed:
      text = f'---\norphan: true\n---\n{text}'
    pages[path.name.lower()] = text
  for path in GENERATED.rglob('*'):
    if path.is_file() and str(path.relative_to(GENERATED)) not in pages:
      path.unlink()
  for name, text in pages.items():
    path = GENERATED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
      path.write_text(text)


def lead_to_pages(app, docname, source):
  """Turns links to files outside of this folder into links to their pages."""

  def page(link):
    name = link[1].rstrip('/').replace('/', '.')
    if name.startswith('iclcl_jax'):
      made = f'api/{name}.rst' if '.' in name else 'api/index.md'
    else:
      made = name.removeprefix('colabs.').lower().replace('.cff', '.md')
    return f'](/generated/{made}'

  if not docname.startswith('generated/'):
    source[0] = re.sub(r'\]\((?:\.\./)+([A-Zci][\w./]+)', page, source[0])


def link_code(app, doctree):
  """Links names of the library, and of tests, wherever they stand as code."""
  docname = app.env.docname
  own = docname.removeprefix('generated/api/')
  for literal in list(doctree.findall(nodes.literal)):
    node, text = literal, literal.astext().removesuffix('()')
    test = re.fullmatch(r'(test_\w+)\.py::(test_\w+)', text)
    target = next(
      (t for t in (f'iclcl_jax.{text}', f'{own}.{text}') if t in PUBLIC), None
    )
    inside = isinstance(literal.parent, nodes.reference | addnodes.pending_xref)
    if inside or not (test or target):
      continue
    options = {'refdomain': 'py', 'reftype': 'obj', 'reftarget': target}
    if test:
      options = {'refdomain': 'std', 'reftype': 'ref'}
      options['reftarget'] = '-'.join(test.groups())
      node = nodes.inline('', 'test')
    link = addnodes.pending_xref(
      '', refdoc=docname, refexplicit=True, refwarn=True, **options
    )
    literal.replace_self(link)
    link += node
  for text in list(doctree.findall(nodes.Text)):  # Types of properties.
    if 'jaxlib._jax.' in text:
      text.parent.replace(text, nodes.Text(text.replace('jaxlib._jax.', '')))
  for block in doctree.findall(nodes.literal_block):
    if block.astext().startswith('>>>'):
      block['language'] = 'pycon'
      block.rawsource = block.astext().rstrip()
      block.children = [nodes.Text(block.rawsource)]


def skip(app, what, name, obj, is_skipped, options):
  """Leaves out fields, which the docstring of their class describes."""
  is_function = inspect.isfunction(inspect.unwrap(obj)) if callable(obj) else 0
  foreign = is_function and not obj.__module__.startswith('iclcl_jax')
  return foreign or type(obj).__name__ == '_tuplegetter' or None


def shorten(app, what, name, obj, options, signature, returns):
  """Writes a signature as the source does."""

  def short(text):
    text = re.sub(r'\bjax(?:lib)?(?:\.\w+)*\.Array\b', 'Array', text)
    if '<' in text:  # A default without a spelling: Sphinx cannot read types.
      text = re.sub(r'<function (\w+)>', r'\1', text)
      text = re.sub(r'<(?!locals).*?>(?=[,)])', '...', text)
      text = re.sub(r', parent: .*', ')', text)  # Of every module of Flax.
      text = re.sub(r'~(?:\w+\.)*', '', text)
    return text

  if signature == '(*args, **kwargs)':  # Of a protocol.
    return '', None
  return signature and short(signature), returns and short(returns)


def setup(app):
  """Tells Sphinx of all this."""
  app.connect('builder-inited', generate)
  app.connect('source-read', lead_to_pages)
  app.connect('doctree-read', link_code)
  app.connect('autodoc-skip-member', skip)
  app.connect('autodoc-process-signature', shorten)
