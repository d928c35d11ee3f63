"""Notebooks run from top to bottom, carry no outputs, and stay short."""

import pathlib
import re
from importlib import util

import nbclient
import nbformat
import pytest

from colabs import head

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('colabs/*.ipynb'))


def _read(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=4)


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_there_is_a_notebook():
  assert NOTEBOOKS


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_carries_no_outputs_and_is_short(path):
  cells = _code(_read(path))
  assert not any(cell.outputs or cell.execution_count for cell in cells)
  lines = [line for cell in cells for line in cell.source.splitlines()]
  assert len([line for line in lines if line.strip()]) <= 60


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_top_of_notebook_is_the_one_that_is_written(path):
  assert path.read_text() == head.with_head(path), 'run python colabs/head.py'


def test_links_to_colab_follow_the_address_of_the_repository():
  readme = (ROOT / 'README.md').read_text()
  assert readme == head.with_address(readme), 'run python colabs/head.py'
  assert head.with_address(f'{head.COLAB.rpartition("/")[0]}/other/blob/x') == (
    f'{head.COLAB}/blob/x'
  )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings('ignore')  # Of the Jupyter machinery, not ours.
def test_notebook_runs(path, tmp_path, monkeypatch):
  notebook = _read(path)
  modules = re.search("MODULES = '(.+)'", _code(notebook)[0].source)[1]
  if missing := [name for name in modules.split() if not util.find_spec(name)]:
    pytest.skip(f'{missing} are missing, and a test installs nothing')
  monkeypatch.setenv('FAST', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('MPLBACKEND', 'Agg')
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  ).execute()
  printed = ''.join(
    output.get('text', '')
    for cell in _code(notebook)
    for output in cell.outputs
  )
  assert 'holds' in printed
