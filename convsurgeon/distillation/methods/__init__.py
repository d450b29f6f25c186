"""Who teaches whom. One file each; the file's name is the method's, and what follows `--method`."""

from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, Setting, get, names, register

__all__ = ["AbstractMethod", "Lesson", "Setting", "get", "names", "register"]
