"""Distance to real images."""
