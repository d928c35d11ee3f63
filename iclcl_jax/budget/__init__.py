r"""How many random directions an attention needs, before it is run.

A random feature map estimates the softmax kernel without bias; how well is a
closed form of

.. math:: v = |q + k|^2 / \sqrt{d_k} \quad\text{(positive, hyperbolic)},
   \qquad u = |q - k|^2 / \sqrt{d_k} \quad\text{(trigonometric)},

and grows like its exponential. `relative_variance` is that form,
`feature_budget` reads it for given queries and keys, and says whether random
features can work there at all. Feature maps and projections are named by
passing the class and the function themselves:

  budget.relative_variance(features.PositiveFeatures, projections.orthogonal,
                           query, key, num_directions=256)

Everything is computed on the host, in float64 and in log space, whatever the
dtype of the inputs: a diagnosis of concrete numbers, not a layer. Results
beyond the range of floating point are capped at `exp(700)`.

Throughout, `feature_map` and `projection_fn` are as in `relative_variance`,
`num_directions` is the number of rows `R` of the projection and `dim` the width
`d_k`. All functions raise `ValueError` if the map is not random, the projection
has no closed form (`simplex_plus`), shapes disagree, numbers are traced,
negative where they must not be, or there are none.
"""

from iclcl_jax.budget._feature_budget import (
  FeatureBudget as FeatureBudget,
  feature_budget as feature_budget,
  feature_budget_at as feature_budget_at,
  typical_squared_norms as typical_squared_norms,
)
from iclcl_jax.budget._variance import (
  LARGEST_VALID_ERROR as LARGEST_VALID_ERROR,
  log_relative_variance_at as log_relative_variance_at,
  predicted_output_error as predicted_output_error,
  relative_variance as relative_variance,
)
