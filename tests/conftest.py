"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Tests run beside each other and with tiny networks: more threads only wait for each other. What a test draws does
    not depend on the tests before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
