"""Scripts that run in other environments (see `harness.metrics.external.scorer`): no import of the harness, and old Python will do."""
