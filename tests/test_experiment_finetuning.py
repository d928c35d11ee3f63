"""`experiments.finetuning`: a small random model, real texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import finetuning as experiment
from experiments.finetuning import runs, study
from experiments.lab import texts
from iclcl_jax import pretrained
from tests import experiment_battery

LABELS = [label for task in texts.TASKS.values() for label in task.labels]
config = experiment_battery.small_config(experiment, sorted({*LABELS}))


@pytest.fixture(scope='module')
def loaded(config):
  return pretrained.load(config.model_path, dtype=jnp.float64)


@pytest.fixture(scope='module')
def model(loaded):
  """Of float64, with its embeddings small enough that blocks matter."""
  return loaded.model


@pytest.fixture(scope='module')
def run(config, loaded):
  """The first task, shown rightly and flipped, two ways of finetuning."""
  ways = [(study.RIGHT, 1e-2), (study.TAUGHT['ascent'], 1e-2)]
  shown = study.RIGHT, study.SHOWN['flipped labels']
  builder = study.Builder(config, loaded.tokenizer)
  found, _ = builder.build(0, 1, config.num_demonstrations, ways, shown, 1)
  return jax.tree.map(lambda x: wide(jnp.asarray(x)), found)


def wide(x):
  return x.astype(float) if x.dtype == jnp.float32 else x


def first(tree, number=0):
  return jax.tree.map(lambda x: x[number], tree)


def test_a_cached_prefix_is_the_full_pass(model, run):
  """Answers are those of one pass over prefix and query without padding."""
  prefix, asked = first(run.shown), (run.queries, run.labels)
  _, answer = jax.jit(runs.ask)(model, prefix, *asked)
  for number in range(len(answer.odds)):
    pair = prefix, first(run.queries, number)
    tokens = np.concatenate([np.asarray(x.tokens)[x.mask] for x in pair])
    logits = pretrained.next_token_logits(model, jnp.asarray(tokens, int))
    one, two = run.labels
    expected = logits[one] - logits[two]
    np.testing.assert_allclose(answer.odds[number], expected, atol=1e-10)
    assert int(answer.top[number, 0]) == np.argmax(logits)


def test_positions_of_the_prefix_do_not_matter_alone(model, run):
  """Zero-shot answers are the same where the demonstrations would end."""
  ask = jax.jit(runs.ask)
  one, two = (
    ask(model, run.begin, run.queries, run.labels, x)[1] for x in (0, run.start)
  )
  assert run.start > 10
  assert not run.begin.mask[0]  # Another instruction is longer.
  np.testing.assert_allclose(one.odds, two.odds, atol=1e-10)
  np.testing.assert_allclose(one.query, two.query, atol=1e-10)


def example_of(model, run):
  """Arguments of a slope: the first example, behind the instruction."""
  arm = first(run.arms)
  text = runs.Text(*map(jnp.append, run.begin, first(arm.texts)))
  layers, _, groups, width = model.blocks.key.weight.shape
  shift = jnp.zeros((layers, groups, len(text.mask), width))
  return text, arm.weights[0], shift


def test_blocks_that_learn_alone_know_nothing_of_later_ones(model, run):
  example = example_of(model, run)
  params = model.blocks.key, model.blocks.value

  def slopes(method, params):
    return jax.jit(method)(model, params, *example)[1][0]

  changed = jax.tree.map(lambda x: x.at[1:].multiply(1.5), params)
  plain, other = (slopes(runs.layerwise, x) for x in (params, changed))
  for one, two in zip(*map(jax.tree.leaves, (plain, other)), strict=True):
    np.testing.assert_array_equal(one[0], two[0])
    assert not np.allclose(one[1], two[1])
  whole, far = (slopes(runs.whole, x) for x in (params, changed))
  for one, two in zip(*map(jax.tree.leaves, (whole, far)), strict=True):
    assert not np.allclose(one[0], two[0], rtol=1e-3)
  for one, two in zip(*map(jax.tree.leaves, (plain, whole)), strict=True):
    np.testing.assert_allclose(one[-1], two[-1], rtol=1e-9, atol=1e-14)
    assert not np.allclose(one[0], two[0], rtol=1e-3)


def test_the_loss_is_that_of_the_example_behind_the_instruction(model, run):
  """Without any padding, in one pass of the library."""
  text, weights, shift = example_of(model, run)
  params = model.blocks.key, model.blocks.value
  (loss, _), _ = jax.jit(runs.whole)(model, params, text, weights, shift)
  tokens = np.asarray(text.tokens)[text.mask]
  kept = np.append(np.zeros(len(run.begin.mask)), weights)[text.mask]
  logits = pretrained.logits(model, jnp.asarray(tokens, int))
  rows = np.asarray(jax.nn.log_softmax(logits))[:-1]
  surprise = -rows[np.arange(len(rows)), tokens[1:]]
  begin = int(np.sum(run.begin.mask))
  assert np.all(kept == (np.arange(len(kept)) >= begin) * (kept > 0))
  assert np.sum(kept) == len(kept) - begin - 2  # The last line is no answer.
  expected = np.sum(surprise * kept[1:]) / np.sum(kept)
  np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_slopes_by_values_and_projections_belong_together(model, run):
  """The value projection's slope is the sum of inputs times slopes."""
  text, weights, shift = example_of(model, run)
  params = model.blocks.key, model.blocks.value
  _, slopes = jax.jit(runs.whole)(model, params, text, weights, shift)
  x = pretrained.embed(model, text.tokens)
  norm = model.blocks.attention_norms.input.scale[0]
  rms = np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + 1e-5)
  expected = np.einsum('nd,gnk->dgk', x / rms * norm[None], slopes[1][0])
  found = slopes[0][1].weight[0]
  np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_a_rate_of_zero_changes_nothing_and_has_no_similarity(model, run):
  arm = first(run.arms)._replace(rate=jnp.zeros(()))
  asked = run.queries, run.labels
  method = 'keys and values'
  tuned, lesson = jax.jit(lambda *x: runs.finetune(*x, method))(
    model, run.begin, arm
  )
  for one, two in zip(*map(jax.tree.leaves, (tuned, model)), strict=True):
    np.testing.assert_array_equal(one, two)
  assert np.all(lesson.loss > 0)
  answers = [runs.ask(model, run.begin, *asked)[1].trace] * 2
  found = runs.compare(answers[0], *answers)
  assert np.isnan(found['SimAOU'])
  assert np.isnan(found['SimAM-delta'])


def test_one_batch_forgets_the_order_and_steps_in_turn_do_not(model, run):
  method = 'keys and values'
  tune = jax.jit(lambda arm: runs.finetune(model, run.begin, arm, method)[0])

  def of(in_turn, order):
    arm = first(run.arms)._replace(in_turn=jnp.asarray(in_turn))
    arm = arm._replace(
      texts=jax.tree.map(lambda x: x[order], arm.texts),
      weights=arm.weights[order],
    )
    return tune(arm).blocks.key.weight

  order = np.arange(len(run.arms.weights[0]))
  np.testing.assert_allclose(of(False, order), of(False, order[::-1]))
  assert np.max(np.abs(of(True, order) - of(True, order[::-1]))) > 1e-9


def test_metrics_are_those_of_numpy_on_recorded_activations(model, run):
  """An oracle in NumPy, of what the model did in context and finetuned."""
  asked = run.queries, run.labels
  method = 'keys and values'
  _, shown = runs.ask(model, first(run.shown), *asked)
  _, zero = runs.ask(model, run.begin, *asked, run.start)
  tuned, lesson = runs.finetune(model, run.begin, first(run.arms), method)
  _, answer = runs.ask(tuned, run.begin, *asked, run.start)
  found = runs.compare(*(x.trace for x in (shown, answer, zero)))
  rows = [np.asarray(x.trace.output) for x in (shown, answer, zero)]

  def cosine(a, b):
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid='ignore'):
      return np.sum(a * b, axis=-1) / size

  def mean(x):
    return np.mean(np.nanmean(x, axis=1))

  unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rows]
  updates = [x - rows[2] for x in rows[:2]]
  axis = unit[2]
  across = [x - axis * np.sum(axis * x, -1, keepdims=True) for x in updates]
  expected = {
    'SimAOU': cosine(*updates),
    'SimAOU, normalised': cosine(unit[0] - unit[2], unit[1] - unit[2]),
    'SimAOU, partial': cosine(*across),
  }
  maps = [np.asarray(x.trace.scores) for x in (shown, answer, zero)]
  expected['SimAM, after'] = cosine(*maps[:2]).mean(axis=-1)
  expected['SimAM, before'] = cosine(maps[0], maps[2]).mean(axis=-1)
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], mean(x), atol=1e-10, err_msg=name)
  found = runs.orders(shown, answer, lesson, run)
  size, length = run.mask.shape
  by = np.einsum('stld,qld->qlst', lesson.queries, answer.query)
  on = np.asarray(shown.trace.earlier).sum(axis=2)[..., -size * length :]
  by = by.reshape(on.shape)
  some = np.asarray(run.some)
  signs = [
    np.sign(x[..., some][..., None] - x[..., some][..., None, :])
    for x in (on, by)
  ]
  taus = (
    np.sum(signs[0] * signs[1], axis=(-2, -1)) / len(some) / (len(some) - 1)
  )
  np.testing.assert_allclose(found['Kendall'], np.mean(taus), atol=1e-10)


def test_nulls_keep_the_size_of_updates_and_lose_their_query():
  draw = np.random.default_rng(0).standard_normal
  tuned, zero = (
    runs.Trace(draw((5, 2, 6)), draw((5, 2, 3, 2)), draw((5, 2, 3, 4)), None)
    for _ in range(2)
  )
  found = runs.nulls(tuned, zero, 7)
  for number in range(runs.DRAWS):
    for one, other, base, noise in zip(
      *(x[:3] for x in (tuned, found['permuted'][number], zero)),
      found['random'][number][:3],
      strict=True,
    ):
      for query in range(5):
        partner = (query - number - 1) % 5
        np.testing.assert_allclose(
          other[query] - base[query], one[partner] - base[partner], atol=1e-12
        )
      sizes = [np.linalg.norm(x - base, axis=-1) for x in (one, noise)]
      np.testing.assert_allclose(*sizes)
      assert not np.allclose(one, noise)


def test_dual_weights_are_compared_as_in_the_space_of_the_kernel():
  """Against features whose products are the kernel's: an eigenbasis."""
  rng = np.random.default_rng(0)
  shapes = (1, 1, 4), (2, 1, 1, 3), (2, 1, 1, 3)
  caches = [
    runs.Cache(
      *jnp.asarray(rng.normal(size=(2, *shape, 5))),
      jnp.arange(shape[-1]),
      jnp.asarray(rng.random((*shape[:-3], shape[-1])) < 0.9),
    )
    for shape in shapes
  ]
  keys = np.concatenate([np.asarray(x.keys).reshape(-1, 5) for x in caches])
  values, vectors = np.linalg.eigh(np.exp(keys @ keys.T / 5**0.5))
  features = vectors * np.sqrt(np.maximum(values, 0))
  parts = np.split(features, [4, 10])
  shown, tuned, zero = (
    np.einsum(
      '...nd,...nr->...dr',
      np.asarray(x.values) * np.asarray(x.mask)[..., None, None, :, None],
      y.reshape(*x.keys.shape[:-1], -1),
    )
    for x, y in zip(caches, parts, strict=True)
  )
  update, one = (tuned - zero).reshape(2, -1), shown.ravel()
  sizes = np.linalg.norm(update, axis=1) * np.linalg.norm(one)
  found = runs.dual_weights(*caches, np.array([1, 2, 3, 0]))
  np.testing.assert_allclose(
    found['dual weights'], np.mean(update @ one / sizes), atol=1e-10
  )


def test_what_is_taught_is_what_its_name_says(config, loaded):
  decode = loaded.tokenizer.decode
  builder = study.Builder(config, loaded.tokenizer)
  ways = [(way, 1.0) for way in study.TAUGHT.values()]
  run, positive = builder.build(0, 0, 3, ways, [study.RIGHT], 0)
  task = texts.TASKS[study.TASKS[0]]
  arms = dict(zip(study.TAUGHT, range(len(ways)), strict=True))

  def lines(name):
    text = first(run.arms.texts, arms[name])
    return [decode(x[y]) for x, y in zip(text.tokens, text.mask, strict=True)]

  def learnt(name):
    arm = first(run.arms, arms[name])
    return [
      decode(x[y > 0]) for x, y in zip(arm.texts[0], arm.weights, strict=True)
    ]

  right, flipped = lines('FT'), lines('flipped labels')
  for one, two in zip(right, flipped, strict=True):
    assert one.startswith('Review: ')
    assert one.endswith('\n\n')
    assert {x for x in task.labels if x in one[-12:]} != {
      x for x in task.labels if x in two[-12:]
    }
  assert learnt('FT') == [x[:-2] for x in right]
  assert set(learnt('labels alone')) <= {*task.labels}
  assert sorted(lines('second order')) == sorted(right)
  assert run.arms.rate[arms['ascent']] == -1
  assert not run.arms.in_turn[arms['one batch']]
  assert not any('Sentiment' in x for x in lines('other text'))
  asked = {decode(x[y]) for x, y in zip(*run.queries, strict=True)}
  assert len(asked) == len(positive) == config.num_queries
  assert not any(x.startswith(y) for x in right for y in asked)


tiny = experiment_battery.small_run(experiment)


def test_tiny_run_is_complete(tiny, config):
  summary, folder = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  assert {*summary['SimAOU']} >= {*study.TAUGHT, 'untrained', 'layers', 'all'}
  assert summary['SimAOU']['rate 0']['all']['mean'] is None
  names = {x['id'] for x in summary['claims']}
  rows = (folder / 'tables' / 'verdicts.csv').read_text().splitlines()
  controls = [x for x in summary['claims'] if x['source'] == 'control']
  assert len(rows) == 1 + len(names) - len(controls)


def test_a_killed_run_ends_in_the_same_numbers(tiny, config, tmp_path, patch):
  # In the middle of the second stage.
  again, num_saved = experiment_battery.stop_and_resume(
    experiment, config, tmp_path, patch, stop_at=8
  )
  assert num_saved == 7 * 6
  assert again['claims'] == tiny[0]['claims']
  assert again['area'] == tiny[0]['area']
