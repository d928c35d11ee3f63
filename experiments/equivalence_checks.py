"""The old home of `for_all`, until its last user has moved."""

from experiments.lab.pretraining import for_all as for_all
