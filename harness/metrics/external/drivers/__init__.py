"""Scripts that run in other environments (see `scorer`): no import of the harness, and old Python will do."""
