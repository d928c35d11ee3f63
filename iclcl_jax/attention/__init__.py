"""Attention of one head over one sequence: softmax, kernel and linear.

`dot_product_attention` puts them into the layout `[B, T, N, H]`.

`softmax_attention`, `kernel_attention` and `linear_attention` answer one query
in the order of the formula, score by score. `stream_kernel_attention` and
`causal_kernel_attention` answer many: through the moments of the keys with a
feature map, score by score with a kernel, one chunk at a time.

Arguments, where a function does not describe them: `phi` is a feature map or a
kernel, `query` `[d_k]` or `queries` `[M, d_k]` the test input, `keys`
`[N, d_k]` the training inputs of the dual model and `values` `[N, d_v]` their
labels, `mask` `[N]` says which keys are valid (None for all), and `chunk_size`
is the number of rows whose features or scores are held at a time. All functions
raise `ValueError` where ranks, sizes or dtypes disagree, there is no key, `phi`
is neither a feature map nor a kernel, or `chunk_size < 1`.

A query that sees no key (everything masked) gets zeros. Inputs of 16 bits are
multiplied as they are and summed in float32; outputs have the inputs' dtype.

Heads and batches are the caller's: `jax.vmap`, or `jax.lax.map` for one after
the other, by which streams are faster and smaller on CPU
(`experiments.benchmark` prints both).

`jax.export` takes a symbolic number of tokens: any for one query, a multiple of
the chunk size for many, `jax.export.symbolic_shape('64*b')`.

References:
  Vaswani et al., arXiv:1706.03762, eq. 1 (softmax); Ren & Liu,
  arXiv:2310.13220, eq. 12 (kernel); Katharopoulos et al., arXiv:2006.16236, eq.
  4, without its denominator (linear) and 9 (carried moments); Choromanski et
  al., arXiv:2009.14794, eq. 4 (streamed); Ainslie et al., arXiv:2305.13245
  (heads that share keys).
"""

from iclcl_jax.attention._kernel import (
  causal_kernel_attention as causal_kernel_attention,
  divide as divide,
  kernel_attention as kernel_attention,
  linear_attention as linear_attention,
  reader as reader,
  scores as scores,
  softmax_attention as softmax_attention,
  stream_kernel_attention as stream_kernel_attention,
  weights as weights,
)
from iclcl_jax.attention._layout import (
  dot_product_attention as dot_product_attention,
)
