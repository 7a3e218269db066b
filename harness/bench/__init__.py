"""Benchmarks with bars: what the implementation promises about its own cost, as ratios measured within one process."""
