"""TODO fidelity."""
