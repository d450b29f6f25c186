"""A small training run for `test_resume.py`, in this process or in one of its own that can be killed.

python killable_run.py METHOD RUN_DIR SECONDS_A_IMAGE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from nets import stripes, tiny
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import convsurgeon as cs
from convsurgeon.distillation import Augmentation, DistillResult

STEPS_PER_EPOCH = 6
EPOCHS = 3


class Noisy(Dataset[Any]):
    """Images with noise from torch's global random state; `on_read` is called for every one."""

    def __init__(self, on_read: Any) -> None:
        self.images, self.labels = stripes(48)
        self.on_read = on_read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.on_read()
        return self.images[index] + 0.1 * torch.randn(1, 8, 8), int(self.labels[index])


def train(
    method: str, run_dir: Path | None, *, resume: bool = False, on_read: Any = lambda: None, **settings: Any
) -> DistillResult:
    """Run, or go on, with a checkpoint after every step."""
    teacher = tiny()
    images, labels = stripes(16, seed=1)
    arguments: dict[str, Any] = {
        "epochs": EPOCHS,
        "learning_rate": 0.02,
        "warmup": 0.0,
        "precision": "no",
        "device": "cpu",
        "augmentation": Augmentation(shift=1),
        "checkpoint_seconds": 0.0,
    }
    return cs.distill(
        teacher,
        cs.rewrite(teacher),
        DataLoader(Noisy(on_read), batch_size=8, shuffle=True),
        torch.utils.data.TensorDataset(images, labels),
        method=method,
        run_dir=run_dir,
        resume=resume,
        **{**arguments, **settings},
    )


def main() -> int:
    """Train slowly, and say so where Ctrl-C ends it."""
    torch.set_num_threads(1)
    method, folder, pause = sys.argv[1:]
    try:
        train(method, Path(folder), on_read=lambda: time.sleep(float(pause)))
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
