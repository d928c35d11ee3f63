"""What holds of every experiment, checked on its tiny run.

A test file of an experiment makes the run once and passes it here::

  tiny = experiment_battery.tiny_run(experiment)

  def test_tiny_run_is_complete(tiny):
    experiment_battery.check_complete(experiment, *tiny)
"""

import dataclasses
import json

import orbax.checkpoint
import pytest

from experiments.lab import claims, texts
from tests import pretrained_files as files


def tiny_run(experiment):
  """A fixture: the summary and the folder of a tiny run, made once a file."""

  @pytest.fixture(scope='module')
  def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny')
    return experiment.run(experiment.Config.tiny(), folder), folder

  return tiny


def small_config(experiment, labels):
  """A fixture: tiny settings, and a small random model that has the labels.

  Tests that need it are skipped where the real reviews are not installed.
  """

  @pytest.fixture(scope='module')
  def config(tmp_path_factory):
    try:
      texts.corpus_path()
    except ValueError as error:
      pytest.skip(str(error))
    path = tmp_path_factory.mktemp('model') / 'small'
    config = experiment.Config.tiny()
    # Its words are letters.
    longer = {'max_tokens': 110} if hasattr(config, 'max_tokens') else {}
    model_path = files.write_model(path, labels)
    return dataclasses.replace(config, model_path=model_path, **longer)

  return config


def small_run(experiment):
  """A fixture: the summary and the folder of the run of `config`."""

  @pytest.fixture(scope='module')
  def tiny(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('out')
    return experiment.run(config, folder), folder

  return tiny


def check_complete(experiment, summary, folder, config=None):
  """Files, claims, figures, tables; asked for again, it answers at once."""
  assert summary == json.loads((folder / 'summary.json').read_text())
  assert summary['conclusion'].endswith('.')
  claims.check(summary['claims'])
  drawn = {f'figures/{path.name}' for path in folder.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn
  assert all(row['caption'].endswith('.') for row in summary['figures'])
  for file in summary['tables']:
    rows = (folder / file).read_text().splitlines()
    assert len(rows) > 1
    assert (folder / file).with_suffix('.tex').exists()
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    assert isinstance(json.loads(line or '{}'), dict)
  stamps = {path: path.stat().st_mtime_ns for path in folder.rglob('*.*')}
  config = experiment.Config.tiny() if config is None else config
  assert experiment.run(config, folder) == summary
  again = {path: path.stat().st_mtime_ns for path in folder.rglob('*.*')}
  again = {k: v for k, v in again.items() if 'probe' not in k.name}
  assert {k: v for k, v in stamps.items() if k.is_file()} == {
    k: v for k, v in again.items() if k.is_file()
  }


def stop_and_resume(experiment, config, folder, patch, *, stop_at):
  """Stops a run behind so many checkpoints, and runs it again in its folder.

  Returns its summary and how many checkpoints both wrote together.
  """
  saved, save = [], orbax.checkpoint.CheckpointManager.save

  def save_and_stop(*arguments, **options):
    save(*arguments, **options)
    saved.append(arguments)
    if len(saved) == stop_at:
      raise KeyboardInterrupt

  patch(orbax.checkpoint.CheckpointManager, 'save', save_and_stop)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, folder)
  return experiment.run(config, folder), len(saved)


def check_refused(experiment, changes, message):
  """A bad setting is an error that names it."""
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(experiment.Config.tiny(), **changes)
