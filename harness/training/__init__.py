"""The parts of the staged training that `harness.training.train` runs: options, batches, one stage, checkpoints, processes."""
