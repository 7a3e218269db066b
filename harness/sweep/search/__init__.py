"""Searching instead of listing: spaces with conditions, draws, suggestions of Optuna, successive halving. Imports no torch."""
