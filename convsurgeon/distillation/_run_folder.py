"""The run folder: what a run was told, what it measured, and where it can go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convsurgeon.errors import DistillationError
from convsurgeon.files import append_line, make_folder, write_text
from convsurgeon.storage import load_checkpoint, save_checkpoint

_VERSION = 1
_COMMAND = "command.json"  # what the command line remembers beside us


class RunFolder:
    """A folder with `config.json`, `metrics.jsonl`, `last.pt`, `best.pt` and, if wanted, TensorBoard events.

    Args:
        path: the folder; made if it does not exist.
        config: what the run was told; compared with what is there when a run is resumed.
        resume: go on from `last.pt` instead of starting afresh.

    Raises:
        DistillationError: if the folder holds a run and `resume` was not said, or the other way round,
            or if the settings differ.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, resume: bool, tensorboard: bool = False) -> None:
        self.path = Path(path)
        config = json.loads(json.dumps({"version": _VERSION, **config}))
        if resume:
            _check_same(self.read_config(self.path), config, self.path)
        elif (self.path / "config.json").exists():
            raise DistillationError(
                f"{self.path} holds a run already; go on with it by --resume {self.path}, or choose another folder"
            )
        elif foreign := sorted(each.name for each in _entries(self.path) if each.name != _COMMAND):
            raise DistillationError(
                f"{self.path} holds other files ({foreign[0]}); a run is written into a new or an empty folder"
            )
        make_folder(self.path)
        self._writer = _tensorboard_writer(self.path) if tensorboard else None
        if not resume:
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    @staticmethod
    def read_config(path: str | Path) -> dict[str, Any]:
        """Return what the run in a folder was told.

        Raises:
            DistillationError: if there is no run.
        """
        file = Path(path) / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DistillationError(f"{path} holds no run to resume: cannot read {file}") from error
        return config

    def note(self, event: Mapping[str, Any]) -> None:
        """Append one event to `metrics.jsonl`, and its numbers to TensorBoard."""
        append_line(self.path / "metrics.jsonl", json.dumps(event))
        if self._writer is not None:
            for key, value in event.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._writer.add_scalar(key, value, event.get("step", 0))
            self._writer.flush()

    def save_last(self, state: Mapping[str, Any]) -> None:
        """Write the state from which the run can go on."""
        save_checkpoint(state, self.path / "last.pt")

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Write the weights of the best student so far."""
        save_checkpoint(state, self.path / "best.pt")

    def load_last(self) -> dict[str, Any] | None:
        """Return the state to go on from, and forget metrics that were noted after it was written."""
        if not (self.path / "last.pt").exists():
            self._truncate_metrics(-1)
            return None
        state = load_checkpoint(self.path / "last.pt")
        self._truncate_metrics(state["step"])
        return state

    def load_best(self) -> dict[str, Any]:
        """Return the weights of the best student."""
        return load_checkpoint(self.path / "best.pt")

    def close(self) -> None:
        """Finish the TensorBoard file, if there is one."""
        if self._writer is not None:
            self._writer.close()

    def _truncate_metrics(self, step: int) -> None:
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the process was killed while it wrote this line
                continue
            if event["step"] <= step:
                kept.append(line)
        write_text(file, "".join(f"{line}\n" for line in kept))


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _check_same(there: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    for key in asked.keys() | there.keys():
        if there.get(key) != asked.get(key):
            raise DistillationError(
                f"{path} was started with other settings: {key} was {there.get(key)!r}, "
                f"now {asked.get(key)!r}; resume with the same ones"
            )


def _tensorboard_writer(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DistillationError(
            "TensorBoard is not installed; install convsurgeon[tensorboard] or leave --tensorboard out"
        ) from error
    return SummaryWriter(str(path / "tensorboard"))
