"""The command line: one file per verb. It parses, calls and draws; nothing here imports torch at import time."""

from convsurgeon.cli._app import main

__all__ = ["main"]
