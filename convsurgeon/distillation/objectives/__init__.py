"""In which loss a student follows a teacher. One file each; the file's name is the objective's."""

from convsurgeon.distillation.objectives._base import AbstractObjective, get, names, register

__all__ = ["AbstractObjective", "get", "names", "register"]
