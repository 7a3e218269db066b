"""The harness: one sampler, one injection, one way to count, time and compare."""
