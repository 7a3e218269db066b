"""Who does which job when, and where results lie. Only `pool` imports ray."""
