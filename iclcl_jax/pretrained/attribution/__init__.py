r"""Which demonstrations taught a language model its answer.

One position of a prompt is read, the last one by default. What its heads see is
cut into segments (the demonstrations, and the rest). Three questions:

* `read_heads` and `direct_logit_attribution`: what does each segment add to
  each head, to the residual stream, and to the difference of two logits? The
  direction of that difference is carried backwards through the blocks exactly
  as they are at that position, with **frozen gates and normalisations**
  (`transformer.linearise`), so all terms together are the difference itself.
* `removal_effects`, within the same result: what if a demonstration is removed
  from the dual state of a head? The head's new output is exact, in closed form;
  its effect on the logits is a first-order approximation of what a new forward
  pass gives (`logit_difference` on the shortened prompt, or with `excluded`).
* `demonstration_gradients`: how large is the gradient of each demonstration in
  the head's dual model, and how much of the loss does its step take away?

Layers are streamed by `jax.lax.scan`. No attention map of all layers is held,
and nothing of shape `[L, H, N, d_model]`.

References:
  Elhage et al., A Mathematical Framework for Transformer Circuits (2021);
  Ren & Liu, arXiv:2310.13220, Theorem 3.1.
"""

from iclcl_jax.pretrained.attribution._influence import (
  effects_of_removal as effects_of_removal,
  influence as influence,
)
from iclcl_jax.pretrained.attribution._logits import (
  LogitAttribution as LogitAttribution,
  attribute as attribute,
  direct_logit_attribution as direct_logit_attribution,
  logit_difference as logit_difference,
  logit_differences_without as logit_differences_without,
)
from iclcl_jax.pretrained.attribution._readings import (
  DemonstrationGradients as DemonstrationGradients,
  HeadReadings as HeadReadings,
  demonstration_gradients as demonstration_gradients,
  read_heads as read_heads,
)
from iclcl_jax.pretrained.attribution._spans import (
  mark_spans as mark_spans,
  token_spans as token_spans,
)
