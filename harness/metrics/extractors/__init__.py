"""TODO extractors."""
