"""Train a student beside its teacher: who teaches whom (`methods`), in which loss (`objectives`)."""

from convsurgeon.distillation._augmentation import Augmentation
from convsurgeon.distillation._config import Training
from convsurgeon.distillation._distill import distill
from convsurgeon.distillation._loop import DistillResult
from convsurgeon.distillation._run_folder import RunFolder

__all__ = ["Augmentation", "DistillResult", "RunFolder", "Training", "distill"]
