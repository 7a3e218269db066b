"""The parts of the staged training that `harness.train` runs: options, batches, one stage, checkpoints, processes."""
