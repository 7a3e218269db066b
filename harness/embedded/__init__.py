"""The small models in the package: what loads them, and how they were made."""
