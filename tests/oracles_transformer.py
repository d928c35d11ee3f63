"""One Transformer block of each family, in NumPy float64 and plain loops.

Imports nothing from the package. A block is a dictionary of arrays in the
layout of the papers: `[in, out]` matrices with all heads side by side.
"""

import math

import numpy as np


def llama_block(p, x, num_heads, num_groups, base, epsilon, mask=None):
  """RMSNorm before, rotated grouped queries, causal, SwiGLU."""
  tokens = np.stack([rms_norm(row, p['norm_1'], epsilon) for row in x])
  x = x + attention(
    p, tokens, num_heads, num_groups, mask=mask, causal=True, base=base
  )
  rows = []
  for row in x:
    n = rms_norm(row, p['norm_2'], epsilon)
    gate = [z / (1 + math.exp(-z)) for z in project(p, 'gate', n)]
    rows.append(row + project(p, 'down', np.array(gate) * project(p, 'up', n)))
  return np.stack(rows)


def gpt2_block(p, x, num_heads, epsilon, mask=None):
  """LayerNorm before, causal, GELU by its tanh formula, biases."""
  tokens = np.stack(
    [layer_norm(row, p['norm_1'], p['shift_1'], epsilon) for row in x]
  )
  x = x + attention(p, tokens, num_heads, num_heads, mask=mask, causal=True)
  rows = []
  for row in x:
    n = layer_norm(row, p['norm_2'], p['shift_2'], epsilon)
    hidden = np.array([gelu_tanh(z) for z in project(p, 'up', n)])
    rows.append(row + project(p, 'down', hidden))
  return np.stack(rows)


def bert_block(p, x, num_heads, epsilon, mask=None):
  """Everybody sees everybody, LayerNorm of the sums, exact GELU, biases."""
  sums = x + attention(p, x, num_heads, num_heads, mask=mask, causal=False)
  rows = []
  for row in sums:
    u = layer_norm(row, p['norm_1'], p['shift_1'], epsilon)
    hidden = [
      z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in project(p, 'up', u)
    ]
    total = u + project(p, 'down', np.array(hidden))
    rows.append(layer_norm(total, p['norm_2'], p['shift_2'], epsilon))
  return np.stack(rows)


def project(p, key, x):
  return x @ p['w_' + key] + p.get('b_' + key, 0)


def rms_norm(x, scale, epsilon):
  return x / math.sqrt(np.mean(x**2) + epsilon) * scale


def layer_norm(x, scale, shift, epsilon):
  deviation = math.sqrt(np.var(x) + epsilon)
  return (x - np.mean(x)) / deviation * scale + shift


def gelu_tanh(z):
  return z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def rotate(x, position, base):
  """Turns the complex numbers `x_i + 1j x_(i + d/2)`."""
  half = len(x) // 2
  turned = [
    complex(x[i], x[i + half])
    * np.exp(1j * position * base ** (-2 * i / len(x)))
    for i in range(half)
  ]
  return np.array([z.real for z in turned] + [z.imag for z in turned])


def attention(p, tokens, num_heads, num_groups, *, mask, causal, base=None):
  """Multi-head attention with its output projection, query by query."""
  size, width = len(tokens), p['w_q'].shape[1] // num_heads
  q, k, v = (project(p, key, tokens) for key in 'qkv')
  result = np.zeros((size, p['w_o'].shape[1])) + p.get('b_o', 0)
  for head in range(num_heads):
    own = slice(head * width, (head + 1) * width)
    group = head // (num_heads // num_groups)
    shared = slice(group * width, (group + 1) * width)
    queries, keys, values = q[:, own], k[:, shared], v[:, shared]
    if base is not None:
      queries = [rotate(row, t, base) for t, row in enumerate(queries)]
      keys = [rotate(row, t, base) for t, row in enumerate(keys)]
    for t in range(size):
      seen = [
        i
        for i in range(size)
        if (i <= t or not causal) and (mask is None or mask[i])
      ]
      if seen:
        scores = np.array([queries[t] @ keys[i] / width**0.5 for i in seen])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        head_output = sum(
          w * values[i] for w, i in zip(weights, seen, strict=True)
        )
        result[t] += head_output @ p['w_o'][own]
  return result
