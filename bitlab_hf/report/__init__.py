"""A run's report: one HTML page that needs nothing else."""

from bitlab_hf.report.page import render
from bitlab_hf.report.run import Run, read_run

__all__ = ["Run", "read_run", "render"]
