r"""The papers' layer and its training on in-context linear regression.

One self-attention layer with positive random features, without residual,
output matrix or feed-forward part. It reads N demonstrations `[s_i ; y_i]` and
a query `[s_q ; 0]`; the label part of the query's output is its prediction,
whose squared error SGD descends, one prompt a step.

The layer is a pure function of ONE run (one seed); `jax.vmap` trains many, but
`jax.lax.map` draws for them: a hash of many keys takes seconds to compile.

The numbers that the papers leave open are chosen here: entries of B from
N(0, 1), `d_x = 11`, `d_y = 1`, entries of the projections from N(0, 1/12).

References:
  Ren & Liu, arXiv:2310.13220, section 5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import config as options
from experiments.lab.compiling import compile_quickly, compute, float64_on_host
from experiments.lab.loops import scan_blocks
from iclcl_jax import _validate, attention, features, projections, tasks
from iclcl_jax.types import Array, Float, PRNGKeyArray

INPUT_DIM = 11
LABEL_DIM = 1
TOKEN_DIM = INPUT_DIM + LABEL_DIM
TOKENS_PER_EPOCH = 1024

# Inputs s of the regression, and the learning rate that suits them.
INPUTS = {'uniform': (tasks.uniform, 3e-3), 'normal': (jax.random.normal, 1e-3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Config):
  """Options of an experiment on layers that it trains."""

  seed: int = options.option(0, 'root of all random numbers', minimum=0)
  input_distribution: str = options.option(
    'uniform', 'distribution of the inputs', choices=tuple(INPUTS)
  )
  multi_task: bool = options.option(
    False, 'a fresh task matrix B for every prompt'
  )
  num_epochs: int = options.count(100, 'epochs of pretraining', tiny=2)
  tokens_per_epoch: int = options.count(
    TOKENS_PER_EPOCH,
    'training tokens of an epoch, whatever N',
    more_than='num_demonstrations',
    tiny=10,
  )
  learning_rate: float = options.option(
    0.0, 'step size of pretraining; 0: that of the inputs', minimum=0
  )
  num_features: int = options.count(1200, 'positive random features R', tiny=16)

  @property
  def rate(self) -> float:
    """The learning rate of pretraining."""
    return self.learning_rate or INPUTS[self.input_distribution][1]


TaskFn: TypeAlias = Callable[[PRNGKeyArray], Float[Array, 'd_y d_x']]


class LayerParams(NamedTuple):
  """Projections of the layer: token rows times these."""

  query: Float[Array, 'd_model d_k']
  key: Float[Array, 'd_model d_k']
  value: Float[Array, 'd_model d_v']


class Run(NamedTuple):
  params: LayerParams  # The trained part.
  phi: features.PositiveFeatures  # Drawn once and never again.
  task_matrix: Float[Array, 'd_y d_x']  # The B of the single-task setting.


def init_run(key: PRNGKeyArray, *, num_features: int = 1200) -> Run:
  """Draws a run in float32, with so many features `R`; consumes the key.

  Example:
    >>> jax.eval_shape(init_run, jax.random.key(0)).phi.projection.shape
    (1200, 12)
  """
  key_params, key_features, key_task = jax.random.split(key, 3)
  shape = 3, TOKEN_DIM, TOKEN_DIM
  params = jax.random.normal(key_params, shape, jnp.float32)
  projection = projections.gaussian(key_features, num_features, TOKEN_DIM)
  return Run(
    params=LayerParams(*(params / TOKEN_DIM**0.5)),
    phi=features.PositiveFeatures(projection),
    task_matrix=draw_task(key_task),
  )


def draw_task(key: PRNGKeyArray) -> Float[Array, 'd_y d_x']:
  """Draws a task matrix B with standard normal entries, in float32."""
  return jax.random.normal(key, (LABEL_DIM, INPUT_DIM), jnp.float32)


def draw_prompts(
  key: PRNGKeyArray,
  steps: Array,
  task_fn: TaskFn,
  num_demonstrations: int,
  *,
  input_fn: Callable[..., Array] = tasks.uniform,
) -> tasks.RegressionPrompt:
  """Draws the prompt of each step from `jax.random.fold_in(key, step)`.

  A step's prompt does not depend on the others, so a resumed run sees the same.
  `task_fn` maps a key to B: `draw_task`, or `lambda key: task_matrix` for one.

  Example:
    >>> def draw(key):
    ...   return draw_prompts(key, jnp.arange(3), draw_task, 15)
    >>> prompts = jax.eval_shape(draw, jax.random.key(0))
    >>> prompts.tokens.shape, prompts.target.shape
    ((3, 16, 12), (3, 1))
  """

  def draw(step):
    key_task, key_inputs = jax.random.split(jax.random.fold_in(key, step))
    return tasks.linear_regression(
      key_inputs, num_demonstrations, task_fn(key_task), input_fn=input_fn
    )

  return jax.lax.map(draw, steps)


def project(
  params: LayerParams, tokens: Float[Array, 'n d_model']
) -> tuple[Float[Array, ' d_k'], Float[Array, 'n d_k'], Float[Array, 'n d_v']]:
  """Returns the query of the last token, and keys and values of all tokens.

  Arguments of the functions of `iclcl_jax`.
  """
  _validate.check_array('tokens', tokens, 'n d_model')
  _validate.check_same(
    'd_model', 'tokens', tokens.shape[1], 'params', params.query.shape[0]
  )
  return tokens[-1] @ params.query, tokens @ params.key, tokens @ params.value


def attend(
  params: LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> Float[Array, ' d_v']:
  """Returns the layer's output at the last token: the definition."""
  return attention.kernel_attention(phi, *project(params, tokens))


def predict(
  params: LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> Float[Array, ' d_y']:
  r"""Returns the predicted label of the query: the fast path of training.

  Equal to the label part of `attend`, with the features never formed:

  .. math:: \log \phi(k)^\top\phi(q) = \mathrm{logsumexp}_r\,
     \omega_r^\top(y_k + y_q) - \tfrac12|y_k|^2 + \mathrm{const},
     \quad y = x / d_k^{1/4}

  One product and one pass of exponentials forward, one product backward.
  """
  query, keys, values = project(params, tokens)
  scale = query.shape[0] ** -0.25
  keys, query = keys * scale, query * scale
  exponents = (keys + query[None]) @ phi.projection.T
  log_scores = jax.nn.logsumexp(exponents, axis=1) - jnp.sum(keys**2, 1) / 2
  return values[:, -LABEL_DIM:].T @ jax.nn.softmax(log_scores)


def squared_error(
  params: LayerParams,
  phi: features.PositiveFeatures,
  prompt: tasks.RegressionPrompt,
) -> Float[Array, '']:
  """Returns the mean squared error of the query's label of one prompt."""
  return jnp.mean((predict(params, phi, prompt.tokens) - prompt.target) ** 2)


def train(
  params: LayerParams,
  phi: features.PositiveFeatures,
  prompts: tasks.RegressionPrompt,
  learning_rate: float | Array,
) -> tuple[LayerParams, Float[Array, ' P']]:
  """Takes one SGD step on each of `P` prompts, in order.

  Returns the trained layer, and the loss of each prompt before its step.
  """
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)

  def step(params, prompt):
    loss, gradient = jax.value_and_grad(squared_error)(params, phi, prompt)
    params = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
    return params, loss

  return jax.lax.scan(step, params, prompts)


def evaluate(
  params: LayerParams,
  phi: features.PositiveFeatures,
  prompts: tasks.RegressionPrompt,
) -> Float[Array, '']:
  """Returns the mean squared error over prompts with a leading axis of `P`."""
  losses = jax.lax.map(lambda x: squared_error(params, phi, x), prompts)
  return jnp.mean(losses)


class Seeds(NamedTuple):
  """All runs, with a leading axis of seeds."""

  runs: Run  # Layers before training, feature maps and tasks.
  training: PRNGKeyArray  # Root keys of the training prompts. Shape `[S]`.
  testing: PRNGKeyArray  # Root keys of the held-out prompts. Shape `[S]`.


@functools.partial(compile_quickly, static_argnames='num_features')
def init_runs(keys: PRNGKeyArray, *, num_features: int) -> Run:
  """Draws a run for each of the keys `[S]`, see `init_run`."""
  return jax.lax.map(lambda key: init_run(key, num_features=num_features), keys)


def init_seeds(seed: int, num_seeds: int, *, num_features: int) -> Seeds:
  """Draws what training starts from: seed i depends on `seed` and i alone."""

  def split(number):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 3)

  keys = compile_quickly(lambda x: jax.lax.map(split, x))(jnp.arange(num_seeds))
  runs = init_runs(keys[:, 0], num_features=num_features)
  return Seeds(runs, keys[:, 1], keys[:, 2])


@dataclasses.dataclass(frozen=True)
class Prompts:
  num_demonstrations: int  # Those of a prompt, `N`.
  input_distribution: str = 'uniform'  # One of `INPUTS`.
  multi_task: bool = False  # A task matrix for every prompt, or for a seed.

  def draw(
    self, keys: PRNGKeyArray, task_matrices: Array, steps: Array
  ) -> tasks.RegressionPrompt:
    """Draws prompts `[S, P]` of some steps, see `draw_prompts`."""
    input_fn, _ = INPUTS[self.input_distribution]

    def of_seed(arguments):
      key, matrix = arguments
      task_fn = draw_task if self.multi_task else lambda key: matrix
      return draw_prompts(
        key, steps, task_fn, self.num_demonstrations, input_fn=input_fn
      )

    return jax.lax.map(of_seed, (keys, task_matrices))

  def held_out(self, seeds: Seeds, num_prompts: int) -> tasks.RegressionPrompt:
    """Draws held-out prompts of all seeds, NumPy arrays `[S, P, ...]`."""
    steps = jnp.arange(num_prompts)
    return compute(self.draw, seeds.testing, seeds.runs.task_matrix, steps)


def pretrain(
  seeds: Seeds,
  prompts: Prompts,
  *,
  num_epochs: int,
  learning_rate: float,
  tokens_per_epoch: int = TOKENS_PER_EPOCH,
  block_epochs: int = 25,
) -> tuple[LayerParams, np.ndarray]:
  """Trains the layers of all seeds by SGD, one new prompt a step.

  Every prompt is new: its loss is a held-out one. Epochs have as many tokens,
  whatever `N`. Returns layers, and losses beside those of predicting 0 `[E, 2,
  S]`.
  """
  size, runs = prompts.num_demonstrations, seeds.runs
  num_prompts = tokens_per_epoch // (size + 1)
  descend = jax.vmap(functools.partial(train, learning_rate=learning_rate))

  def epoch(params, number):
    steps = number * num_prompts + jnp.arange(num_prompts)
    drawn = prompts.draw(seeds.training, runs.task_matrix, steps)
    params, losses = descend(params, runs.phi, drawn)
    zero = jnp.mean(drawn.target**2, axis=(1, 2))
    return params, jnp.stack([jnp.mean(losses, axis=1), zero])

  params, losses = scan_blocks(
    epoch,
    runs.params,
    num_epochs,
    block_size=block_epochs,
    name=f'demonstrations_{size}',
    description=f'pretraining, N = {size}, {len(seeds.training)} seeds',
  )
  if not np.all(np.isfinite(losses)):
    raise ValueError(
      f'learning_rate is {learning_rate:g}, with which training diverged at '
      f'N = {size}; lower it.'
    )
  return params, np.asarray(losses)


def for_all(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Applies `fn(params, phi, tokens)` to prompts `[S, P, n, d_model]`.

  Layers have an axis of seeds; one prompt of every seed is held at a time.
  """

  def swap(tree):
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

  def mapped(params, phi, tokens):
    def row(tokens):
      return jax.vmap(fn)(params, phi, tokens)

    return swap(jax.lax.map(row, swap(tokens)))

  return mapped


class Trained(NamedTuple):
  """The layers of all seeds after training on prompts of one length."""

  params: LayerParams  # The layers, NumPy arrays `[S, ...]`.
  phi: features.PositiveFeatures
  losses: np.ndarray  # By epoch, of training and of predicting 0, `[E, 2, S]`.
  prompts: tasks.RegressionPrompt  # Held-out ones, NumPy arrays `[S, P, ...]`.

  @property
  def target(self) -> np.ndarray:
    """True labels of the held-out prompts. Shape `[S, P, d_y]`."""
    return np.asarray(self.prompts.target, np.float64)

  def cast(self, dtype: Any) -> tuple[Any, Any, np.ndarray]:
    """Layers, feature maps and tokens of the held-out prompts, in a dtype."""
    arrays = self.params, self.phi, self.prompts.tokens
    return jax.tree.map(lambda x: np.asarray(x, dtype), arrays)


def trained(
  config: options.Config, seeds: Seeds, num_demonstrations: int
) -> Trained:
  """Trains layers by the settings of an experiment, all but their length."""
  inputs = config.input_distribution
  prompts = Prompts(num_demonstrations, inputs, config.multi_task)
  params, losses = pretrain(
    seeds,
    prompts,
    num_epochs=config.num_epochs,
    learning_rate=config.rate,
    tokens_per_epoch=config.tokens_per_epoch,
    block_epochs=config.block_epochs,
  )
  layers, phi = jax.device_get((params, seeds.runs.phi))
  held_out = prompts.held_out(seeds, config.num_test_prompts)
  return Trained(layers, phi, losses, held_out)


@float64_on_host()
def over_prompts(
  fn: Callable[..., Any],
  layers: Trained,
  dtype: Any,
  num_prompts: int | None = None,
) -> Any:
  """Calls `fn(params, phi, tokens)` for all layers and held-out prompts.

  In a dtype, perhaps for a few prompts of a seed; NumPy arrays `[S, P, ...]`.
  """
  params, phi, tokens = layers.cast(dtype)
  return compute(for_all(fn), params, phi, tokens[:, :num_prompts])
