"""The model, a calibration text, and texts to be judged on."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import models, texts
from iclcl_jax import finite_duals, pretrained

WORDS = 8  # At least so many tokens of a text come of one review.


class Texts(NamedTuple):
  """What is read; `P` texts of `N` tokens of each kind."""

  model: pretrained.LanguageModel
  calibration: np.ndarray  # Reviews with their sentiment, `[N]`.
  reviews: np.ndarray  # Other reviews in the same form, `[P, N]`.
  plots: np.ndarray  # Sentences of plots, as prose, `[P, N]`.


@lab.once
def load(config: Any) -> Texts:
  """Reads the model and cuts the texts: no review is in two of them."""
  model, tokenizer = models.load(config)
  num_texts = max(config.num_texts, config.num_head_texts)
  each = -(-config.num_tokens // WORDS)
  task = texts.TASKS['sentiment']
  options: Any = {'seed': config.seed, 'min_words': WORDS}
  shown = [
    task.demonstration(x.text, x.positive)
    for x in texts.draw_reviews(each * (num_texts + 1), **options)
  ]
  plots = [
    x.text + ' '
    for x in texts.draw_subjective(2 * each * num_texts, **options)
    if not x.positive
  ]

  def cut(parts, number, opening=''):
    text = opening + ''.join(parts[number * each : (number + 1) * each])
    return tokenizer.encode(text)[: config.num_tokens]

  numbers = range(num_texts)
  return Texts(
    model,
    cut(shown, num_texts, task.instruction),
    np.stack([cut(shown, x, task.instruction) for x in numbers]),
    np.stack([cut(plots, x) for x in numbers]),
  )


def learner(config: Any) -> finite_duals.WindowedLearner:
  """The first token and a window exactly, the rest by features."""
  return finite_duals.WindowedLearner(num_sinks=1, window=config.window)


def nothing(*axes: int, width: int) -> finite_duals.ExponentialFeatures:
  """A map whose feature is 0: what is exact stands alone."""
  weight = jnp.zeros((*axes, 1, width), jnp.float32)
  bias = jnp.zeros((*axes, 1), jnp.float32)
  return finite_duals.ExponentialFeatures(weight, weight, bias - 1e4, bias)
