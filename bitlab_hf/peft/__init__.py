"""PEFT on ternary layers: what it may do, and merging."""
