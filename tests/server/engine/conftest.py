"""The engine tests' worker."""

from __future__ import annotations

import pytest
import torch

from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.work import DeviceWorker


@pytest.fixture(scope="session")
def worker() -> DeviceWorker:
    return TorchWorker(torch.device("cpu"))
