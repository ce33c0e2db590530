"""Stubs for the service's tests."""

from __future__ import annotations

import pytest

from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.calling import Connect, stub_on
from tests.server.serving import RunningServer


@pytest.fixture
def stub(server: RunningServer, connect: Connect) -> LossServiceStub:
    """Return a stub to the server that all tests share."""
    return stub_on(connect(server.address))
