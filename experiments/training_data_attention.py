r"""A network trained on digits answers as attention over its training history.

Trains a ReLU network by SGD with momentum and coupled weight decay on the
digits that ship with scikit-learn, records the inputs and the error signals of
every layer, and then answers for test images without the trained weights: each
linear layer attends to its own history. Which training images spoke for the
predicted class, and which against it, is read off the same sum::

  python -m experiments.training_data_attention --workdir=out/training_data

It takes about half a minute of CPU time. Expect (5 seeds, float64) a residual
of 6e-15, a test accuracy of .977 [.956, .988], and unsigned scores that vote
for the predicted class in 86, 92 and 90 % of the test images, layer by layer.

References:
  Irie, Csordas & Schmidhuber, arXiv:2202.05798.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import figures as drawing
from iclcl_jax.accounts import training_data_attention as account
from iclcl_jax.types import Array, Float

SOURCE = 'Irie et al., arXiv:2202.05798'
NUM_CLASSES = 10
EXACT = 1e-10
GOOD_ACCURACY = 0.93
NUM_SHOWN = 5
NUM_VOTES = 500  # Largest scores that count, as in the paper.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(5, 'independent runs', minimum=5)
  hidden_widths: tuple[int, ...] = lab.count((64, 64), 'widths', tiny=(8,))
  num_steps: int = lab.count(1000, 'training steps', tiny=60)
  batch_size: int = lab.count(32, 'images of a training step', tiny=16)
  learning_rate: float = lab.option(0.05, 'step size of SGD', minimum=0)
  momentum: float = lab.option(0.9, 'heavy-ball momentum', minimum=0, below=1)
  weight_decay: float = lab.option(1e-4, 'coupled weight decay', minimum=0)
  num_test: int = lab.count(360, 'held-out images', tiny=50)
  num_recalled: int = lab.count(
    60, 'test images that are recalled', at_most='num_test', tiny=4
  )


class Digits(NamedTuple):
  """Flat images with pixels in `[0, 1]`, and their classes, split in two."""

  images: Float[Array, 'n d']
  labels: Array
  test_images: Float[Array, 'm d']
  test_labels: Array


class Results(NamedTuple):
  """What the history says of the first test images, by seed."""

  accuracy: Float[Array, ' S']  # On all test images.
  residual: Float[Array, ' S']  # Of a layer and its recall.
  predicted: Array  # Class of each recalled image.
  vote_agrees: Float[Array, 'S depth']  # How often largest scores do.
  contributions: Float[Array, 'S recalled n']  # To the score of that class.


def _digits(config: Config) -> Digits:
  """The images that ship with scikit-learn, in an order of their own."""
  import sklearn.datasets

  bunch = sklearn.datasets.load_digits()
  order = np.random.default_rng(config.seed).permutation(len(bunch.target))
  images, labels = bunch.data[order] / 16, bunch.target[order]
  count = config.num_test
  config.require(
    count < len(labels), 'num_test', f'fewer than the {len(labels)} images'
  )
  return Digits(images[count:], labels[count:], images[:count], labels[:count])


@lab.float64_on_host()
def measure(config: Config) -> Results:
  """Trains, recalls and attributes, seed by seed: histories are large."""
  digits = _digits(config)
  one_seed = functools.partial(_one_seed, config, digits)
  return lab.compute_each(one_seed, jnp.arange(config.num_seeds))


def _one_seed(config: Config, digits: Digits, seed) -> Results:
  images, labels, tests, test_labels = map(jnp.asarray, digits)
  widths = (images.shape[1], *config.hidden_widths, NUM_CLASSES)
  names = 'learning_rate', 'momentum', 'weight_decay'
  options = {name: getattr(config, name) for name in names}
  left = account.remains(config.num_steps, **options)
  key = jax.random.fold_in(jax.random.key(config.seed), seed)
  key_network, key_batches = jax.random.split(key)
  start = account.init_network(key_network, widths, dtype=images.dtype)
  shape = config.num_steps, config.batch_size
  batches = jax.random.randint(key_batches, shape, 0, len(images))
  params, histories = account.train(start, images, labels, batches, **options)
  inputs, outputs = jax.vmap(lambda x: account.layer_inputs(params, x))(tests)
  predicted = jnp.argmax(outputs, axis=1)

  def recall(rows):
    """Largest difference over the layers, relative to what was added."""
    worst = jnp.zeros(())
    for before, after, history, row in zip(
      start, params, histories, rows, strict=True
    ):
      output = account.recall(before, history, left, row)
      gap = jnp.max(jnp.abs(output - after @ row))
      worst = jnp.maximum(worst, gap / jnp.max(jnp.abs(output)))
    return worst

  def attribute(row):
    x, label = row
    direction = jax.nn.one_hot(label, NUM_CLASSES, dtype=x.dtype)
    visits = account.attribute(histories[-1], left, x, direction)
    return jnp.zeros(len(images)).at[batches].add(visits)

  def vote(row, history):
    """The class that the largest absolute scores belong to."""
    scores = jnp.abs(history.inputs @ row).ravel()
    largest, visits = jax.lax.top_k(scores, min(NUM_VOTES, scores.shape[0]))
    classes = labels[batches.ravel()[visits]]
    return jnp.argmax(jnp.zeros(NUM_CLASSES).at[classes].add(largest))

  def agree(rows):
    *rows, label = rows
    votes = [vote(*pair) for pair in zip(rows, histories, strict=True)]
    return jnp.stack(votes) == label

  recalled = tuple(x[: config.num_recalled] for x in inputs)
  shown = predicted[: config.num_recalled]
  return Results(
    accuracy=jnp.mean(predicted == test_labels),
    residual=jnp.max(jax.lax.map(recall, recalled)),
    predicted=shown,
    vote_agrees=jnp.mean(jax.lax.map(agree, (*recalled, shown)), axis=0),
    contributions=jax.lax.map(attribute, (recalled[-1], shown)),
  )


def share(shares: Any, num_images: int) -> lab.Estimate:
  """Mean share of all seeds with Wilson's 95 % interval, within `[0, 1]`.

  All seeds are asked about the same images, so these are counted once.
  """
  mean, squared = float(np.mean(shares)), 1.959964**2 / num_images
  middle = (mean + squared / 2) / (1 + squared)
  half = (squared * (mean * (1 - mean) + squared / 4)) ** 0.5 / (1 + squared)
  low, high = max(middle - half, 0.0), min(middle + half, 1.0)
  return lab.Estimate(mean, min(low, mean), max(high, mean))


def _accuracy(config: Config, results: Results) -> lab.Estimate:
  return share(results.accuracy, config.num_test)


def _votes(config: Config, results: Results) -> list[lab.Estimate]:
  """How often the votes of a layer agree with the prediction."""
  return [share(x, config.num_recalled) for x in results.vote_agrees.T]


def claims(config: Config, results: Results) -> list[lab.Claim]:
  votes = dict(enumerate(_votes(config, results), 1))
  text = f"""
    identity [{SOURCE}] every linear layer of a trained network answers as
      attention over its training history | largest relative difference over
      layers, test images and seeds, float64
    accuracy [control] the network is worth explaining | test accuracy, mean
      over seeds, Wilson interval for {config.num_test} images
    """
  text += ''.join(
    f"""vote-{depth} [{SOURCE}, section 4] the largest unsigned attention scores
      belong to training images of the predicted class, layer {depth} | fraction
      of test images where the {NUM_VOTES} largest absolute scores, summed by
      class, favour the predicted one (chance: 0.1), mean over seeds, Wilson
      interval for {config.num_recalled} images
    """
    for depth in votes
  )
  return lab.statements(
    'training-data-',
    text,
    {
      'identity': lab.at_most(EXACT, np.max(results.residual)),
      'accuracy': lab.at_least(GOOD_ACCURACY, _accuracy(config, results)),
      **{f'vote-{depth}': lab.at_least(0.5, x) for depth, x in votes.items()},
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  accuracy = _accuracy(config, results)
  return {
    'residual_float64': np.max(results.residual),
    'test_accuracy': accuracy.value,
    'test_accuracy_95_percent_interval': accuracy,
    'vote_agrees_by_layer': _votes(config, results),
    'num_seeds': config.num_seeds,
  }


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  values = {'test_accuracy': results.accuracy, 'residual': results.residual}
  return lab.tidy({}, values, seed=range(config.num_seeds))


def figures(config: Config, results: Results) -> list[lab.Figure]:
  attended = """Test images (left, with the predicted class) and the training
    images that add most to, and take most from, its score, with what each
    contributes over all its visits. Inputs of the last layer are not negative,
    so an image supports its own class by construction; which ones are loudest
    can be learnt here. One seed, the first test image of each predicted
    class."""
  votes = f"""How often the class with the largest sum of absolute attention
    scores (the {NUM_VOTES} largest) is the predicted one, by layer: mean over
    {config.num_recalled} test images, a dot for each of {config.num_seeds}
    seeds. Dashed: chance."""
  return [
    lab.Figure('attended', _draw_attended(_digits(config), results), attended),
    lab.Figure('votes', _draw_votes(results), votes),
  ]


def _draw_attended(digits: Digits, results: Results) -> Any:
  """Test images, and the training images that spoke loudest."""
  predicted = results.predicted[0]
  rows = [int(np.argmax(predicted == c)) for c in np.unique(predicted)]
  figure, axes = drawing.subplots(
    len(rows), 2 * NUM_SHOWN + 1, figsize=(11, 1.3 * len(rows)), squeeze=False
  )
  for line, row in zip(axes, rows, strict=True):
    scores = results.contributions[0, row]
    order = np.argsort(scores)
    shown = [*order[::-1][:NUM_SHOWN], *order[:NUM_SHOWN]]
    _image(line[0], digits.test_images[row], f'predicted {predicted[row]}')
    for axis, index in zip(line[1:], shown, strict=True):
      title = f'{digits.labels[index]}: {scores[index]:+.2f}'
      _image(axis, digits.images[index], title)
  figure.suptitle(
    'test image | most supporting training images | most opposing (class: '
    'contribution)'
  )
  return figure


def _image(axis, pixels, title: str) -> None:
  axis.imshow(pixels.reshape(8, 8), cmap='gray_r', vmin=0, vmax=1)
  axis.set_title(title, fontsize=9, loc='center')
  axis.set(xticks=[], yticks=[])
  axis.spines[:].set_visible(True)


def _draw_votes(results: Results) -> Any:
  figure, axis = drawing.subplots(figsize=(6, 3.2))
  shares = results.vote_agrees.T
  for depth, votes in enumerate(shares, 1):
    marks = np.full(votes.shape, depth)
    axis.plot(marks, votes, 'o', mfc='none', color=drawing.BLUE)
  axis.axhline(1 / NUM_CLASSES, color=drawing.BLACK, linestyle='--')
  axis.set_xticks(range(1, len(shares) + 1))
  axis.set(ylim=(0, 1.04), xlabel='layer', ylabel='votes that agree')
  return figure


PARTS = {
  'history': lab.Part(measure, claims, figures, summary, metrics=metrics)
}


def conclude(config: Config, results, claims) -> str:
  found = results['history']
  votes = ', '.join(f'{x.value:.0%}' for x in _votes(config, found))
  return f"""A network with a test accuracy of {_accuracy(config, found):.3f} is
    reproduced from its initial weights and its training history alone, layer by
    layer, up to {np.max(found.residual):.1e} (float64). The values it attends
    to are error signals, not labels. Without them, the largest scores vote for
    the predicted class in {votes} of the test images (layers in order; chance
    is 10%)."""


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
