"""Drift from the dense model's images and predictions."""
