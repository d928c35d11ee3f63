"""What `experiments.reproduce` runs, and with which settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Job(NamedTuple):
  """One experiment of the page.

  Attributes:
    name: its folder.
    module: its module in `experiments`.
    title: its heading.
    options: fields of its config that differ from the default.
    fast: those of a tiny run.
  """

  name: str
  module: str
  title: str
  options: Mapping[str, Any]
  fast: Mapping[str, Any]


JOBS = (
  Job(
    'equivalence',
    'equivalence',
    'Attention is one gradient step',
    {},
    {
      'num_seeds': 5,
      'num_demonstrations': (3,),
      'num_epochs': 2,
      'tokens_per_epoch': 24,
      'num_features': 16,
      'num_test_prompts': 4,
      'num_dual_prompts': 2,
      'dual_epochs': 3,
    },
  ),
  Job(
    'approximation',
    'approximation',
    'Random features against softmax',
    {},
    {
      'num_draws': 20,
      'num_seeds': 5,
      'num_features': (48, 96, 192),
      'heatmap_features': (48, 192),
      'reference_features': 96,
      'standard_deviations': (1.0,),
      'second_num_demonstrations': 7,
      'num_epochs': 1,
    },
  ),
  Job(
    'modifications',
    'modifications',
    'Regularised, augmented and negative attention',
    {},
    {
      'num_seeds': 3,
      'num_epochs': 4,
      'early_epochs': 1,
      'block_epochs': 2,
      'num_demonstrations': 4,
      'longer_num_demonstrations': 6,
      'tokens_per_epoch': 10,
      'num_features': 8,
      'num_test_prompts': 2,
    },
  ),
  Job(
    'regularized_gradient_descent',
    'regularized_gradient_descent',
    'The regularised layer against regularised gradient descent',
    {},
    {
      'num_seeds': 5,
      'num_demonstrations': 3,
      'alphas': (-0.5, 0.0, 0.5),
      'dual_epochs': (1, 4),
      'num_epochs': 2,
      'tokens_per_epoch': 16,
      'num_features': 8,
      'num_test_prompts': 2,
    },
  ),
  Job(
    'generalization',
    'generalization',
    'The generalisation bound',
    {},
    {
      'num_seeds': 5,
      'num_samples': 3,
      'num_demonstrations': (2, 4, 8),
      'width': 2,
      'widths': (1, 2, 4),
      'width_demonstrations': 8,
      'num_features': 6,
      'num_signs': 4,
      'num_sign_samples': 2,
      'num_weights': 4,
      'num_traces': 5,
      'trace_demonstrations': 64,
    },
  ),
  Job(
    'learning_processes',
    'learning_processes',
    'Three ways to learn a representation',
    {},
    {
      'num_seeds': 10,
      'num_prompts': 1,
      'num_demonstrations': 6,
      'num_features': 16,
      'num_training_prompts': 4,
      'num_dual_steps': 12,
      'num_process_steps': 15,
    },
  ),
  Job(
    'softmax_regression',
    'softmax_regression',
    'Softmax regression: shifts of weights and of data',
    {},
    {
      'num_seeds': 5,
      'num_words': (4, 6),
      'widths': (2, 3),
      'num_tasks': 4,
      'num_steps': 4,
      'num_records': 2,
      'words_per_batch': 24,
      'num_test': 2,
    },
  ),
  Job(
    'training_data_attention',
    'training_data_attention',
    'A trained network as attention over its training data',
    {},
    {
      'hidden_widths': (8,),
      'num_steps': 60,
      'batch_size': 16,
      'num_recalled': 4,
      'num_test': 50,
    },
  ),
  Job(
    'online_learners',
    'online_learners',
    'Sequence layers as online learners',
    {},
    {
      'dim': 3,
      'num_groups': 5,
      'tasks_per_group': 20,
      'tuning_length': 4,
      'max_length': 8,
      'scales': (1.0, 2.0),
    },
  ),
  Job(
    'meta_optimizer',
    'meta_optimizer',
    'Implicit finetuning, its metrics and their nulls',
    {},
    {'num_seeds': 5, 'num_queries': 8, 'width': 64, 'num_draws': 2},
  ),
  Job(
    'linear_regression_gd',
    'linear_regression_gd',
    'Linear self-attention and gradient descent',
    {
      'num_steps': 2000,
      'num_test_tasks': 4000,
      'deep_steps': 1000,
      'parts': ('softmax', 'steps', 'stacks', 'alternating'),
    },
    {
      'parts': (),
      'd_x': 2,
      'num_demonstrations': 4,
      'batch_size': 64,
      'num_steps': 300,
      'softmax_steps': 50,
      'record_every': 50,
      'learning_rate': 1e-2,
      'num_test_tasks': 200,
    },
  ),
  Job(
    'accounts',
    'accounts',
    'All accounts on the same tasks',
    {},
    {
      'num_seeds': 5,
      'd_x': 2,
      'learners': ('linear attention',),
      'accounts': ('von Oswald et al.',),
      'num_demonstrations': 3,
      'lengths': (1, 3, 5),
      'scales': (1.0, 2.0),
      'batch_size': 4,
      'num_batches': 2,
      'num_steps': 4,
      'num_test_prompts': 8,
    },
  ),
)
