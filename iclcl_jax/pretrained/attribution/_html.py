"""Pages by the templates of this folder, which escape what they are given."""

import functools
import pathlib
from importlib import util
from typing import Any

import numpy as np

from iclcl_jax.pretrained._reading import import_reader


def fill(name: str, **values: Any) -> str:
  return _environment().get_template(name).render(np=np, **values)


def show(name: str, **values: Any) -> str | None:
  """Fills a template for a notebook, which prints the object for None."""
  return fill(name, **values) if util.find_spec('jinja2') else None


@functools.cache
def _environment() -> Any:
  jinja2 = import_reader('jinja2')
  return jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
