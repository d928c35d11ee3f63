r"""The dual model of attention: gradient descent on a contrastive loss.

The dual model is :math:`f(x) = W\phi(x)`. Its training set are the
demonstrations: keys are inputs, values are labels. From the state that the
query-side tokens give (`zero_shot`), ONE gradient step on
`losses.contrastive` yields a model whose prediction for the query is the
attention output.

`phi` is a feature map, and the state then a `DualState`, or a kernel, and the
state a `KernelDualState`: coefficients over the keys, so that the softmax
kernel needs no feature map. All functions take both.

States are query-free: they carry the sum of the features of all visible tokens
(the mass), and `predict` divides by it. The papers' form with a normaliser `D`
that is fixed for one query is `predict(..., normaliser=normaliser(...))`.

Arguments, where a function does not describe them:

=================  ==========================================================
``phi``            feature map or kernel
``state``          the state before a step, or the trained one that is asked
``keys``           inputs of the demonstrations, ``[N, d_k]``
``values``         their labels, ``[N, d_v]``
``query``          the test input, ``[d_k]``; ``queries [M, d_k]``
``mask``           valid rows, ``[N]``; None for all
``learning_rate``  the step size, not negative; 1 gives attention
``chunk_size``     rows whose features are held at a time
``axis_name``      name of an axis of the mesh, or names of several
=================  ==========================================================

All functions raise `ValueError` where ranks, sizes or dtypes disagree, a state
does not belong to `phi`, no demonstration is given, or a number is not finite
or out of its range.

References:
  Ren & Liu, arXiv:2310.13220: Theorem 3.1 (`zero_shot`, `one_step`, `predict`,
  and the sum over demonstrations that `all_merge` splits), eq. 9
  (`normaliser`), v1 section 5 (`train` with batches of one).
"""

from iclcl_jax.dual._states import (
  Removal as Removal,
  all_merge as all_merge,
  merge as merge,
  normaliser as normaliser,
  predict as predict,
  prefix_merge as prefix_merge,
  read as read,
  remove as remove,
)
from iclcl_jax.dual._steps import (
  Trajectory as Trajectory,
  empty as empty,
  one_step as one_step,
  one_step_autodiff as one_step_autodiff,
  train as train,
  zero_shot as zero_shot,
)
