"""What the library computes, once more, in NumPy float64 and plain loops.

Imports nothing from the package and shares no code with it. Names follow the
axes of `iclcl_jax.types`; every function takes and returns NumPy arrays.
"""

import functools
import itertools
import math

import jax
import numpy as np

# Feature maps: one vector [d] -> features.


def positive_features(projection, x):
  y = x / len(x) ** 0.25
  rows = [math.exp(w @ y - y @ y / 2) for w in projection]
  return np.array(rows) / math.sqrt(len(projection))


def hyperbolic_features(projection, x):
  y = x / len(x) ** 0.25
  plus = [math.exp(w @ y - y @ y / 2) for w in projection]
  minus = [math.exp(-w @ y - y @ y / 2) for w in projection]
  return np.array(plus + minus) / math.sqrt(2 * len(projection))


def trigonometric_features(projection, x):
  y = x / len(x) ** 0.25
  sines = [math.sin(w @ y) for w in projection]
  cosines = [math.cos(w @ y) for w in projection]
  scale = math.exp(y @ y / 2) / math.sqrt(len(projection))
  return np.array(sines + cosines) * scale


def elu_plus_one_features(x):
  return np.array([t + 1 if t > 0 else math.exp(t) for t in x])


def identity_features(x):
  return np.array(x, dtype=np.float64)


def taylor_features(order, x):
  """Monomials by degree, then lexicographically, over `sqrt(alpha!)`."""
  y = x / len(x) ** 0.25
  result = []
  for degree in range(order + 1):
    for chosen in itertools.combinations_with_replacement(
      range(len(x)), degree
    ):
      counts = [chosen.count(i) for i in range(len(x))]
      value = math.prod(float(y[i]) ** n for i, n in enumerate(counts))
      weight = math.prod(math.factorial(n) for n in counts)
      result.append(value / math.sqrt(weight))
  return np.array(result)


# Kernels of two vectors.


def exponential_kernel(x, y):
  return math.exp(sum(a * b for a, b in zip(x, y, strict=True)) / len(x) ** 0.5)


def gaussian_kernel(x, y):
  square = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
  return math.exp(-square / (2 * len(x) ** 0.5))


def linear_kernel(x, y):
  return float(sum(a * b for a, b in zip(x, y, strict=True)))


def truncated_exponential_kernel(order, x, y):
  score = x @ y / len(x) ** 0.5
  return sum(score**r / math.factorial(r) for r in range(order + 1))


def truncated_exponential(order):
  """The same as a pytree: a kernel of one's own, of either sign, in tests."""
  kernel = functools.partial(truncated_exponential_kernel, order)
  return jax.tree_util.Partial(kernel)


# Attention. `kernel` is a function of two vectors; the one of a feature map is
# `feature_kernel(map)`.


def feature_kernel(feature_fn):
  return lambda x, y: float(feature_fn(x) @ feature_fn(y))


def softmax_attention(query, keys, values, mask=None):
  scores = np.einsum('nd,d->n', keys, query) / len(query) ** 0.5
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  weights = np.exp(scores - scores.max())
  return np.einsum('n,nv->v', weights / weights.sum(), values)


def kernel_attention(kernel, query, keys, values, mask=None):
  numerator, denominator = np.zeros(values.shape[1]), 0.0
  for i in range(len(keys)):
    if mask is None or mask[i]:
      weight = kernel(keys[i], query)
      numerator += weight * values[i]
      denominator += weight
  return numerator / denominator


def linear_attention(kernel, query, keys, values, mask=None):
  result = np.zeros(values.shape[1])
  for i in range(len(keys)):
    if mask is None or mask[i]:
      result += kernel(keys[i], query) * values[i]
  return result


def causal_attention(kernel, queries, keys, values, mask=None):
  """Row t attends to the keys 0..t; a row that sees none gets zeros."""
  rows = []
  for t in range(len(queries)):
    seen = None if mask is None else mask[: t + 1]
    if seen is not None and not seen.any():
      rows.append(np.zeros(values.shape[1]))
    else:
      rows.append(
        kernel_attention(
          kernel, queries[t], keys[: t + 1], values[: t + 1], seen
        )
      )
  return np.stack(rows)


# The dual model.


def dual_weights(feature_fn, keys, values, mask=None):
  """`(sum_i v_i phi(k_i)^T, sum_i phi(k_i))`: shapes [d_v, R] and [R]."""
  features = np.stack([feature_fn(key) for key in keys])
  keep = np.ones(len(keys)) if mask is None else mask.astype(np.float64)
  weights = np.einsum('n,nv,nr->vr', keep, values, features)
  return weights, np.einsum('n,nr->r', keep, features)


def dual_prediction(feature_fn, weights, mass, query):
  features = feature_fn(query)
  return weights @ features / (mass @ features)


def residual(kernel, query, keys, values, output, other):
  """`max |a - b| / S` with the backward-stable scale S of the identity."""
  scores = np.array([kernel(key, query) for key in keys])
  weights = np.abs(scores) / abs(scores.sum())
  spread = np.abs(values) + np.abs(output)[None]
  return np.abs(output - other).max() / (weights @ spread).max()
