"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run beside each other and with tiny networks: more threads only wait for each other."""
    torch.set_num_threads(1)
