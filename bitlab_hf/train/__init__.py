"""Training: what is added to a Trainer for quantization-aware fine-tuning."""

from bitlab_hf.train.statistics import TernaryStatistics

__all__ = ["TernaryStatistics"]
