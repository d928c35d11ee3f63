"""What all steps on a loss share."""

from iclcl_jax import losses
from iclcl_jax.types import Array, Loss, Penalty


def check_objective(
  loss: Loss, penalty: Penalty | None, values: Array, *, masked: bool
) -> None:
  """Checks that a state can descend a loss and a penalty of its weights."""
  losses.check_loss(loss)
  if losses.declares_normaliser(loss):
    raise ValueError(
      'loss declares the keyword normaliser, which belongs to one query; a '
      'state serves all. Bind it: functools.partial(loss, normaliser=D), with '
      'D from dual.normaliser.'
    )
  losses.check_value(loss, values)
  losses.check_penalty(penalty)
  if masked and not losses.is_sum_over_demonstrations(loss):
    raise ValueError(
      'loss is not declared a sum over demonstrations, so rows cannot be '
      'left out (a mask, or an incomplete batch). Declare it with '
      'losses.sum_over_demonstrations, or pass whole batches without mask.'
    )
  if masked:
    losses.check_sum(loss)
