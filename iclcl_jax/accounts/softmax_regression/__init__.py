r"""Softmax regression: what a weight shift and a data shift do to its target.

A document :math:`A` (one word a row) and a target :math:`b` in the simplex pose

.. math:: \min_x L = \tfrac12 |c|^2, \quad c = f - b, \quad
   f(A, x) = \mathrm{softmax}(A x).

A gradient step on `x` (a weight shift) and a step on `A` (a data shift, as an
attention layer rewrites its document) are compared as changes of the target.
All derivatives need no more than :math:`f`: with
:math:`J v = f \circ v - f \langle f, v\rangle` they are

.. math:: \nabla_x L = A^\top J c, \quad \nabla_A L = (J c)\, x^\top, \quad
   \nabla_b L = -c, \quad \nabla_x^2 L = A^\top B A

with `B` the Hessian in the logits. Derivatives, identities and Lipschitz
constants hold for any target; the extremes of the eigenvalues of `B` need one
in the simplex, which `problem` checks.

Throughout, `document` is :math:`A` `[n, d]`, `weights` are :math:`x` `[d]`,
`target` is :math:`b` `[n]`, `prediction` is :math:`f` `[n]`, `posed` holds
document and target, and `learning_rate` is the step size :math:`\eta`.
"""

from iclcl_jax.accounts.softmax_regression._calculus import (
  Gradients as Gradients,
  Problem as Problem,
  apply_jacobian as apply_jacobian,
  centre as centre,
  gradients as gradients,
  hessian as hessian,
  logit_hessian as logit_hessian,
  loss as loss,
  predict as predict,
  problem as problem,
)
from iclcl_jax.accounts.softmax_regression._steps import (
  attend as attend,
  data_shift as data_shift,
  shifted_target as shifted_target,
  smallest_data_shift as smallest_data_shift,
  weight_shift as weight_shift,
)
