"""Experiments: absl binaries on top of iclcl_jax, importable as functions."""
