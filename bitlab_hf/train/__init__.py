"""Training: what is added to a Trainer for quantization-aware fine-tuning."""

from bitlab_hf.fit.calibrate import CalibrationReport, calibrate
from bitlab_hf.fit.rotate import rotate
from bitlab_hf.train.baseline import record_baseline
from bitlab_hf.train.gather import PackedAllGather, pack_all_gather
from bitlab_hf.train.guard import last_checkpoint
from bitlab_hf.train.logits import precompute_logits
from bitlab_hf.train.recipe import RECIPES, Recipe
from bitlab_hf.train.schedule import QuantStrengthWarmup
from bitlab_hf.train.statistics import TernaryStatistics
from bitlab_hf.train.trainer import BitLabTrainer, sft_trainer

__all__ = [
    "RECIPES",
    "BitLabTrainer",
    "CalibrationReport",
    "PackedAllGather",
    "QuantStrengthWarmup",
    "Recipe",
    "TernaryStatistics",
    "calibrate",
    "last_checkpoint",
    "pack_all_gather",
    "precompute_logits",
    "record_baseline",
    "rotate",
    "sft_trainer",
]
