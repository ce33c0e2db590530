"""tritonclient's stub for the tests of the Open Inference service."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.calling import Connect
from tests.server.open_inference.asking import stub_on
from tests.server.serving import RunningServer


@pytest.fixture
def triton(server: RunningServer, connect: Connect) -> Any:
    """Return a stub to the server that all tests share."""
    return stub_on(connect(server.address))
