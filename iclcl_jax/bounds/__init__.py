r"""Generalisation of the dual model: Rademacher complexity and bounds.

The loss that one gradient step descends, the *representation loss*
:math:`L(W) = E[-v^\top W\phi(k)]`, is estimated by its mean :math:`\hat L` over
N independent demonstrations. With probability at least :math:`1 - \delta`, for
all :math:`|W| \le w` at once,

.. math:: L(W) \le \hat L(W) + \frac{2w}{N}\sqrt{\sum_i |v_i|^2 k(k_i, k_i)}
   + 6 B \sqrt{\frac{\log(2/\delta)}{2N}}, \qquad |v^\top W\phi(k)| \le B.

The first term bounds twice the empirical Rademacher complexity

.. math:: \hat R = E_s \sup_{|W| \le w} \frac1N \sum_i s_i v_i^\top W\phi(k_i)
   = \frac{w}{N}\, E_s \Bigl|\sum_i s_i v_i\,\phi(k_i)^\top\Bigr|_*,

:math:`|\cdot|_*` the dual norm. `FROBENIUS` is the ball of Theorem 3.2 as read
here, `SPECTRAL` that of the operator norm, which costs a factor
:math:`\sqrt{\min(d_v, N)}`. The loss is linear in `W`, so suprema over a ball
are norms and need no search.

Kernels of long keys overflow, and squares of labels do. Results that cannot be
negative are `LogValue`, formed in log space and in float32 at least, and
`radius` and `loss_bound` may be given as such. Demonstrations are read in
chunks: no `[N, R]` or `[N, N]` array is held.

Arguments, where a function does not describe them: `phi` is a feature map or
kernel, `keys` `[N, d_k]` are inputs of the demonstrations and `values`
`[N, d_v]` their labels, `radius` is the radius `w > 0` of the `ball`, and
`delta` the probability of failure, in (0, 1). All functions raise `ValueError`
where ranks, sizes or dtypes disagree, there is no demonstration, a state does
not belong to `phi`, or a number is not finite or out of its range.

References:
  Ren & Liu, arXiv:2310.13220v2, Theorem 3.2, there as an order of magnitude;
  Bartlett & Mendelson, JMLR 3 (2002), Definition 2 and Lemma 22; Mohri,
  Rostamizadeh & Talwalkar, Foundations of Machine Learning, Theorem 3.3. The
  closed form of the supremum is derived here.
"""

from iclcl_jax.bounds._gaps import (
  GeneralizationBound as GeneralizationBound,
  expected_loss as expected_loss,
  gap_supremum as gap_supremum,
  generalization_bound as generalization_bound,
  mean_embedding as mean_embedding,
  rademacher_bound as rademacher_bound,
  rademacher_draws as rademacher_draws,
)
from iclcl_jax.bounds._norms import (
  FROBENIUS as FROBENIUS,
  SPECTRAL as SPECTRAL,
  Ball as Ball,
  LogValue as LogValue,
  Positive as Positive,
  log_diagonal as log_diagonal,
)
