"""The documentation site: strict, whole, and without a network."""

import html
import inspect
import pathlib
import re
import subprocess
import sys
import zlib

import pytest

from tests import test_public_functions as library

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The site without outputs of notebooks: a warning is an error."""
  for name in ('furo', 'myst_nb', 'sphinx', 'sphinx-mathjax-offline'):
    pytest.importorskip(
      name, reason=f'{name} is missing: make docs installs it'
    )
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going']
  command += ['-D', 'nb_execution_mode=off', 'docs', str(folder)]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  return folder


def test_every_public_name_has_a_page(site):
  inventory = (site / 'objects.inv').read_bytes().split(b'\n', 4)[4]
  found = {line.split()[0] for line in zlib.decompress(inventory).splitlines()}
  expected = set(library.public_functions().values())
  for name, module in library.modules().items():
    if '._' not in name:
      expected |= {
        f'{name}.{member}'.removeprefix('iclcl_jax.')
        for member, value in vars(module).items()
        if inspect.isclass(value)
        and not member.startswith('_')
        and f'{value.__module__}.'.startswith(f'{name}.')
      }
  assert len(expected) > 300
  assert {f'iclcl_jax.{x}'.encode() for x in expected} <= found


def test_a_page_asks_nothing_of_the_network(site):
  for page in site.rglob('*.html'):
    loads = re.findall(r'<(?:script|img|link|iframe)\b[^>]*>', page.read_text())
    assert loads
    assert not [
      tag for tag in loads if re.search(r'(src|href)="(https?:)?//', tag)
    ]


@pytest.mark.parametrize(
  ('page', 'answer'),
  [
    ('howto/projection.html', 'jax.grad(error)(phi)'),
    ('howto/tolerance.html', 'the tolerance is what rounding can explain'),
    ('howto/features.html', 'budget.feature_budget(*kind'),
    ('devices.html', "('devices',)"),
    ('generated/citation.html', '@article{ren2024'),
    ('generated/api/iclcl_jax.modified.html', 'class Attention'),
    ('generated/changelog.html', '0.2.0'),
    ('howto/own.html', 'features.from_log(jax.nn.log_softmax)'),
    ('frameworks.html', 'equivalence.verify_heads(**call)'),
    ('howto/attribution.html', '--prompt_file=mine.txt --labels='),
    ('howto/attribution.html', 'What to trust'),
    ('howto/experiments.html', '--num_demonstrations=63'),
  ],
)
def test_a_question_is_answered_one_click_from_the_start(site, page, answer):
  start = (site / 'index.html').read_text().split('id="where-to-read-on"')[1]
  assert f'href="{page}' in start
  text = re.sub(r'<[^>]*>', '', (site / page).read_text())
  assert ' '.join(answer.split()) in ' '.join(html.unescape(text).split())
