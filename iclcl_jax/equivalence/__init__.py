"""Machine-checked certificates that attention is one gradient step.

Three independent paths compute one number: attention adds up scored values,
the closed-form dual model applies its weights, and the autodiff dual model
gets its weights from `jax.grad` of the loss. `verify` compares them, for the
contrastive loss of plain attention or for any other; `verify_model` compares
them for every head of a stack of Transformer blocks. `verify_heads` compares
the dual models with what somebody else's model has computed, which `capture`
sees in Flax, Equinox or plain JAX.

Arguments that a function does not describe are those of `verify`. All raise
`ValueError` where ranks, sizes or dtypes disagree, or no demonstration is
left; certificates are of concrete arrays: making one inside `jit` is an error.

References:
  Ren & Liu, arXiv:2310.13220, Theorem 3.1, head by head.
"""

from iclcl_jax.equivalence._capture import capture as capture, record as record
from iclcl_jax.equivalence._certificate import (
  Certificate as Certificate,
  verify as verify,
)
from iclcl_jax.equivalence._heads import (
  HeadsCertificate as HeadsCertificate,
  verify_heads as verify_heads,
)
from iclcl_jax.equivalence._model import (
  ModelCertificate as ModelCertificate,
  ModelResiduals as ModelResiduals,
  certificate_of as certificate_of,
  model_residuals as model_residuals,
  verify_model as verify_model,
)
from iclcl_jax.equivalence._residuals import (
  Residuals as Residuals,
  residuals as residuals,
)
