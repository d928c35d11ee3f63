"""Real models as pure functions over a parameter pytree."""
