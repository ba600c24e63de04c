"""Reads and writes checkpoints: headers, files, saving, the card."""
