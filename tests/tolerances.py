"""All tolerances of the tests, of the backward-stable residual."""

IDENTITY = {'float64': 1e-12, 'float32': 1e-5, 'bfloat16': 2e-2}
OTHER_SUMMATION_ORDER = {'float64': 1e-11, 'float32': 1e-4}
SIGMAS = 5  # Monte-Carlo means: SIGMAS * sigma / sqrt(samples).
