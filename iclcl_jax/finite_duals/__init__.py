r"""Finite dual models that imitate the softmax on given heads.

Random features need more directions than there are atoms on real queries and
keys (`budget` says so beforehand). The maps of this room are made for a head,
by queries and keys of a calibration text:

* `fit_landmarks`: keys as non-negative mixtures of a few chosen keys;
* `train_features`: exponentials of learnt directions;
* `nystroem`: the symmetric one, of either sign;
* `balance`: centred and balanced rows in front of random features.

All but `nystroem` read queries through a second tower, `phi.scaled_query`: the
weights :math:`W = \sum_i v_i\,\phi_k(k_i)^\top` are still those of one
contrastive step, and :math:`f(q) = W\phi_q(q)` reads them through another
encoder: the identity is exact, however well a map imitates the softmax.

`WindowedLearner` is the sum of two learners: the first tokens and the last ones
exactly, all others by features. `pretrained.finite` makes a language model of
them.

References:
  Lee & Seung, NIPS 2000 (multiplicative steps); Zhang et al., arXiv:2402.04347
  (attention distilled into features) and arXiv:2410.10254 (a window beside
  them); Williams & Seeger, NIPS 2000, and Xiong et al., arXiv:2102.03902
  (`nystroem`); Xiao et al., arXiv:2309.17453 (sinks).
"""

from iclcl_jax.finite_duals._fitting import (
  balance as balance,
  fit_landmarks as fit_landmarks,
  train_features as train_features,
)
from iclcl_jax.finite_duals._learners import (
  WindowedLearner as WindowedLearner,
  WindowState as WindowState,
)
from iclcl_jax.finite_duals._maps import (
  BalancedFeatures as BalancedFeatures,
  ExponentialFeatures as ExponentialFeatures,
  LandmarkFeatures as LandmarkFeatures,
  NystroemFeatures as NystroemFeatures,
  nystroem as nystroem,
)
