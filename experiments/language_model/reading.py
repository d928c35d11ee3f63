"""Which demonstrations matter to the answer, and what was it read from?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, statistics
from experiments.language_model import identity, prompts
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution


class Results(NamedTuple):
  """The difference of two logits behind a prompt, taken apart.

  Positive numbers speak for the first label, the likelier one.
  """

  loaded: prompts.Loaded  # Model and prompt.
  page: attribution.Page  # What the library found, and shows.
  label_ids: tuple[prompts.Label, prompts.Label]  # What is compared.
  identity_error: float  # What the sum of all terms lacks, over their sizes.
  removal: np.ndarray  # Lost if each head alone forgets, first order, `[S]`.
  drop_shares: np.ndarray  # Of the loss drop; NaN if scores are capped, `[S]`.

  @property
  def logit_difference(self) -> float:
    """Logit of the first label less that of the second."""
    return float(self.page.attribution.logit_difference)

  @property
  def of_tokens(self) -> np.ndarray:
    """What the heads of the last position read from each token. Shape `[N]`."""
    found = self.page.attribution.contributions
    return np.einsum('lhn->n', found, dtype=np.float64)

  @property
  def of_demonstrations(self) -> np.ndarray:
    """What they read from each demonstration. Shape `[S]`."""
    numbers = np.arange(len(self.page.names))
    return (self.loaded.segments == numbers[:, None]) @ self.of_tokens

  @property
  def screened(self) -> np.ndarray:
    """The demonstrations whose deletion influence can predict.

    Not the one that holds the first token: idle heads rest there, and without
    it everything changes.
    """
    numbers = np.arange(len(self.page.names))
    return numbers[numbers != self.loaded.segments[0]]

  @property
  def of_heads(self) -> np.ndarray:
    """What each head reads, from the whole prompt. Shape `[L, H]`."""
    found = self.page.attribution
    heads = np.sum(found.contributions, 2, dtype=np.float64)
    return np.asarray(heads + found.rest)

  @property
  def rest(self) -> float:
    """What the heads read outside of demonstrations, in a label too."""
    demonstrations = self.of_demonstrations
    return float(self.of_heads.sum() - demonstrations.sum())

  @property
  def embedding(self) -> float:
    """Of the last token itself."""
    return float(self.page.attribution.embedding)

  @property
  def biases(self) -> float:
    """Of all blocks and of the head."""
    found = self.page.attribution
    return float(found.biases.sum(dtype=np.float64) + found.final_bias)


@lab.once
@jax.default_matmul_precision('highest')
def measure(config: Config) -> Results:
  """Takes the difference of two logits behind the prompt apart."""
  forward, _ = identity.first_pass(config)
  loaded = prompts.load(config)
  log_probs = _log_probabilities(loaded, forward.log_probs)
  pair = prompts.likelier_first(loaded.labels, log_probs)
  spans = loaded.prompt.spans.tolist()
  page = attribution.page(
    loaded.model, loaded.tokenizer, loaded.prompt.text, spans, pair
  )
  found = page.attribution
  terms = (
    *(found.contributions, found.rest, found.embedding),
    *(found.biases, found.final_bias),
  )
  flat = np.concatenate([np.ravel(x).astype(np.float64) for x in terms])
  difference = float(found.logit_difference)
  labels = [jnp.asarray(ids) for ids in pair]
  removal, shares = _of_demonstrations(loaded, labels)
  return Results(
    loaded=loaded,
    page=page,
    label_ids=pair,
    identity_error=float(abs(flat.sum() - difference) / np.abs(flat).sum()),
    removal=removal,
    drop_shares=shares,
  )


def _log_probabilities(loaded: prompts.Loaded, of_tokens: np.ndarray) -> Any:
  """Log-probabilities of the labels, those of the next tokens if they are."""
  labels = loaded.labels
  if labels is None or isinstance(labels[0], int):
    return of_tokens

  def score(model, tokens, labels):
    return pretrained.score_labels(model, tokens, labels)

  texts = [np.array(ids) for ids in labels]
  found = lab.compute(score, loaded.model, loaded.tokens, texts)
  return dict(zip(labels, found, strict=True))


def _of_demonstrations(loaded: prompts.Loaded, labels) -> list[np.ndarray]:
  """Removal from heads, and share of the loss drop."""
  count = len(loaded.prompt.demonstration_labels)
  if not count:
    return [np.zeros(0)] * 2

  def measure(model, tokens, segments, labels):
    prompt, size = (model, tokens, segments), {'num_segments': count}
    parts = attribution.attribute(*prompt, *labels, **size)
    shares = jnp.full((1, 1, count), jnp.nan)  # A capped kernel has no norm.
    if model.architecture.score_cap is None:
      gradients = attribution.demonstration_gradients(*prompt, **size)
      shares = gradients.drop_shares
    removal = jnp.sum(parts.removal_effects, axis=(0, 1))
    return removal, jnp.mean(shares, axis=(0, 1))

  segments = jnp.asarray(loaded.segments)
  found = lab.compute(measure, loaded.model, loaded.tokens, segments, labels)
  return [np.asarray(x, np.float64) for x in found]


def claims(config: Config, results: Results) -> list[lab.Claim]:
  return lab.statements(
    'language-model-',
    """attribution [Elhage et al. (2021), direct paths] contributions of heads
    and tokens sum to the difference of two logits | what the sum lacks over the
    sum of absolute values, float32""",
    {'attribution': lab.at_most(1e-5, results.identity_error)},
  )


def demonstrations(results: Results) -> list[dict[str, Any]]:
  return [
    {
      'number': index + 1,
      'label': label,
      'holds_first_token': index == results.loaded.segments[0],
      'influence': results.page.influence[index],
      'contribution': results.of_demonstrations[index],
      'removal_effect': results.removal[index],
      'deletion_effect': results.page.effects[index],
      'loss_drop_share': results.drop_shares[index],
    }
    for index, label in enumerate(results.loaded.prompt.demonstration_labels)
  ]


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'attribution': {
      'labels': results.page.labels,
      'label_ids': results.label_ids,
      'labels_note': labels_note(config, results),
      'label_probabilities': np.exp(results.page.log_probabilities),
      'logit_difference': results.logit_difference,
      'identity_error': results.identity_error,
      'demonstrations': demonstrations(results),
      'first_token': {
        'contribution': results.of_tokens[0],
        'demonstration': int(results.loaded.segments[0]) + 1 or None,
      },
      'rest': results.rest,
      'embedding': results.embedding,
      'biases': results.biases,
      'rank_correlation_with_deletion': {
        'influence': rank_correlation(results, results.page.influence),
        'contribution': rank_correlation(results, results.of_demonstrations),
        'removal_effect': rank_correlation(results, results.removal),
      },
      'contribution_of_heads': results.of_heads,
    }
  }


def tables(config: Config, results: Results) -> dict[str, Any]:
  rows = demonstrations(results)
  return {'demonstrations': rows} if rows else {}


def labels_note(config: Config, results: Results) -> str:
  """Why these two tokens are compared; empty if they are the labels."""
  names = sorted(set(results.loaded.prompt.demonstration_labels))
  if config.labels or len(names) == 2:
    return ''
  reason = f'The demonstrations have {len(names)} labels'
  if len(names) < 2:
    reason = 'The prompt has no demonstrations'
  if len(names) == 1:
    reason = f'All demonstrations have the label {names[0]!r}'
  return (
    f'{reason}, so there are not two to compare: the two likeliest next tokens '
    'stand in for them (--labels=A,B chooses others).'
  )


def rank_correlation(results: Results, predicted: np.ndarray) -> float | None:
  """With the effect of deletion; None for fewer than four demonstrations."""
  rows, measured = results.screened, results.page.effects
  if len(rows) < 4:
    return None
  found = statistics.rank_correlation(predicted[rows], measured[rows])
  return float(found)


def sentence(config: Config, results: Results) -> str:
  """What to remember of this question; nothing without demonstrations."""
  page = results.page
  predicted, measured = page.influence, page.effects
  screened = results.screened
  if not screened.size:
    return ''
  best = screened[np.argmax(np.abs(predicted[screened]))]
  text = f"""Of {screened.size} demonstrations behind the first token, number
    {best + 1} matters most to the logit difference of
    {results.logit_difference:.2f} in favour of {page.labels[0]!r}: without
    it the difference would lose {predicted[best]:+.2f}, says the influence;
    deleted, it loses {measured[best]:+.2f}."""
  read = results.of_demonstrations
  ranks = [rank_correlation(results, x) for x in (predicted, read)]
  if None in ranks:
    return text
  return f"""{text} Spearman's rank correlation with deletion over these
    demonstrations of one prompt is {ranks[0]:.2f} for the influence and
    {ranks[1]:.2f} for what the heads of the last position read."""
