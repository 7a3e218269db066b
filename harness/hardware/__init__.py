"""The machine: what it is, what a job used of it, and who else is at work on it."""
