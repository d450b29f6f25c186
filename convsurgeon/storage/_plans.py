"""Plans in files, which people edit and pass on."""

from __future__ import annotations

import stat
from pathlib import Path

from convsurgeon.errors import PlanError
from convsurgeon.surgery import Plan

# a hundred times the plan of the largest network in torchvision or timm
_LARGEST = 100 * 10**6


def read_plan(path: str | Path) -> Plan:
    """Read a plan from its JSON file.

    Raises:
        PlanError: in one line that names the file, if it is missing, no regular file, or no plan.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(f"cannot read the plan {path}: it is a folder, pipe, socket or device")
        if status.st_size > _LARGEST:
            raise PlanError(f"{path} has {status.st_size / 1e6:.0f} MB, which no plan has")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # text that is not UTF-8 is a ValueError, and a name that cannot be
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    try:
        return Plan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
