"""Tiny settings of experiments whose config has no `tiny()` yet."""

from typing import Any

TINY: dict[str, dict[str, Any]] = {
  'modifications': {
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
  'regularized_gradient_descent': {
    'num_seeds': 5,
    'num_demonstrations': 3,
    'alphas': (-0.5, 0.0, 0.5),
    'dual_epochs': (1, 4),
    'num_epochs': 2,
    'tokens_per_epoch': 16,
    'num_features': 8,
    'num_test_prompts': 2,
  },
}
