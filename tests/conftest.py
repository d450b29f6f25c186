"""What all tests share: one thread, and hypothesis without clocks or chance."""

import signal

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# a program started in the background inherits an ignored Ctrl-C; tests send one
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("convsurgeon", deadline=None, derandomize=True)
settings.load_profile("convsurgeon")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `pytest --update-golden` write the golden files anew, to be read in the diff."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew")
