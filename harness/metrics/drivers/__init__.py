"""Scripts that run in other environments (see `harness.metrics.outside`): no import of the harness, and old Python will do."""
