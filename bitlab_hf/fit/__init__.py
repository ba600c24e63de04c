"""Ternary weights without, or before, training."""
