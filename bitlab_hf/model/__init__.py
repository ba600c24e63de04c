"""Changes a model in memory: finds its layers, swaps them, deploys them."""
