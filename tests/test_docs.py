"""What the documents say is run, and what they name exists."""

import doctest
import os
import pathlib
import re
import subprocess
import sys

import pytest

import iclcl_jax
from iclcl_jax import pretrained

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [
  line
  for line in (ROOT / 'docs/equations.md').read_text().splitlines()
  if '::test_' in line
]
PAGES = sorted(
  str(path.relative_to(ROOT))
  for path in ROOT.glob('docs/**/*.md')
  if 'generated' not in path.parts
)


# How many examples each page has at least.
EXAMPLES = {
  'docs/devices.md': 15,  # First: it sets the number of devices.
  'README.md': 10,
  'docs/accounts.md': 5,
  'docs/equations.md': 20,
  'docs/frameworks.md': 20,
  'docs/models.md': 10,
  'docs/index.md': 10,
  'docs/theory.md': 5,
  'docs/howto/features.md': 5,
  'docs/howto/own.md': 25,
  'docs/howto/paper.md': 5,
  'docs/howto/projection.md': 10,
  'docs/howto/tolerance.md': 5,
}


def run_examples(paths, folder):
  """In a process of its own: documents speak of JAX's default settings."""
  result = subprocess.run(
    [sys.executable, '-m', 'doctest', *(str(ROOT / path) for path in paths)],
    cwd=folder,  # Where they may write.
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stdout + result.stderr


def test_code_prints_what_it_says(tmp_path):
  for path, least in EXAMPLES.items():
    text = (ROOT / path).read_text()
    assert len(doctest.DocTestParser().get_examples(text)) > least
  run_examples(EXAMPLES, tmp_path)


def test_the_page_of_a_prompt_is_made_as_it_is_said(tmp_path):
  try:
    pretrained.smollm2.weights_path()
  except ValueError as error:
    pytest.skip(str(error))
  run_examples(['docs/howto/attribution.md'], tmp_path)
  assert 'Which demonstration matters' in (tmp_path / 'page.html').read_text()


ARCHITECTURE = (ROOT / 'docs/architecture.md').read_text()


def test_every_question_is_answered_where_the_index_says():
  index = ARCHITECTURE.split('## Where is')[1].split('## How to add')[0]
  rows = [line.split('|')[2] for line in index.splitlines() if '? |' in line]
  assert len(rows) >= 10
  for row in rows:
    folder = ROOT / 'experiments'
    for name in re.findall(r'`([^`]+)`', row):
      if '/' in name:
        path = ROOT / 'experiments' / name.removeprefix('experiments/')
        folder = path.parent
      else:
        path = folder / name
      assert path.exists(), name


def test_there_are_equations():
  assert len(ROWS) > 20


@pytest.mark.parametrize('row', ROWS)
def test_equation_names_tests_and_functions_that_exist(row):
  file, name = re.search(r'`(test_\w+\.py)::(test_\w+)`', row).groups()
  assert f'def {name}(' in (ROOT / 'tests' / file).read_text()
  functions = re.findall(r'`([a-z_]+)\.([\w.*]+)`', row.split('|')[-3])
  functions += re.findall(r'`([a-z]+)\.(\w[\w.*]*)` with a kernel', row)
  assert functions
  for module, path in functions:
    target = getattr(iclcl_jax, module)
    for part in path.split('.'):
      target = target if part == '*' else getattr(target, part)


@pytest.mark.parametrize(
  'path',
  ['README.md', 'BUILD.md', 'CONTRIBUTING.md', *PAGES],
)
def test_relative_links_lead_somewhere(path):
  text = (ROOT / path).read_text()
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    if not link.startswith('http'):
      assert ((ROOT / path).parent / link).exists(), link


def test_the_readme_cites_what_the_citation_file_cites():
  titles = re.findall(
    r'title: "?(.+?)"?\n', (ROOT / 'CITATION.cff').read_text()
  )
  readme = (ROOT / 'README.md').read_text()
  assert len(titles) == 2
  assert all(f'{{{{{title}}}}}' in readme for title in titles)
