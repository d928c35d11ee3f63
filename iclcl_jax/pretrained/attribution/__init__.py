r"""Which demonstrations taught a language model its answer.

What a prompt shows is cut into segments: the demonstrations, and the rest. The
last position is read. Four questions; `page` answers all but the last in one:

* `influence`: what does the answer lose if a demonstration is deleted? To first
  order, through the dual models of all heads at all later tokens.
* `effects_of_removal`: what does it lose exactly? One pass, packed.
* `read_heads` and `direct_logit_attribution`, both by `attribute`: what did the
  heads at the last position read in each segment? A decomposition of the
  difference of two logits, exact as a sum: its direction is carried backwards
  through the blocks as they are at that position, with **frozen gates and
  normalisations** (`transformer.linearise`). It says nothing of what the
  demonstrations do to the tokens between, so it does not predict deletion, and
  neither do its `removal_effects`, from the dual states at that position alone.
* `demonstration_gradients`: how large is the gradient of each demonstration in
  a head's dual model, and how much of the loss does its step take away?

Layers are streamed by `jax.lax.scan`. No attention map of all layers is held,
and nothing of shape `[L, H, N, d_model]`.

References:
  Elhage et al., A Mathematical Framework for Transformer Circuits (2021),
  direct paths; Ren & Liu, arXiv:2310.13220, Theorem 3.1: the step is a sum over
  demonstrations (its drop of the loss derived here); Pruthi et al.,
  arXiv:2002.08484 (TracIn), the first order of `influence` for the examples of
  a training set.
"""

from iclcl_jax.pretrained.attribution._influence import (
  effects_of_removal as effects_of_removal,
  influence as influence,
)
from iclcl_jax.pretrained.attribution._logits import (
  LogitAttribution as LogitAttribution,
  attribute as attribute,
  direct_logit_attribution as direct_logit_attribution,
)
from iclcl_jax.pretrained.attribution._page import Page as Page, page as page
from iclcl_jax.pretrained.attribution._readings import (
  DemonstrationGradients as DemonstrationGradients,
  HeadReadings as HeadReadings,
  demonstration_gradients as demonstration_gradients,
  read_heads as read_heads,
)
from iclcl_jax.pretrained.attribution._spans import mark_spans as mark_spans
