"""What clients and the service see when a worker or the network is lost."""

from __future__ import annotations

import pytest
from ray_hosts.faults import FAULTS
from ray_hosts.ordeal import endure, reference
from ray_service import RayService

pytestmark = [pytest.mark.server, pytest.mark.slow]
TOLD = 15.0  # seconds until each client knows
RECOVERED = 90.0


@pytest.mark.parametrize("kind", ["kill -9 of a worker process", "silent partition"])
def test_clients_are_told_and_the_service_comes_back(ray_service: RayService, kind: str):
    server = ray_service.server
    expected = ray_service.once(reference, server)
    outcome = endure(ray_service.cluster, server, FAULTS[kind], expected)
    assert outcome.wrong == 0
    assert all(answer.whole or answer.error for answer in outcome.answers)
    assert any(answer.error for answer in outcome.answers)  # it did befall them
    assert outcome.told < TOLD
    assert outcome.recovered < RECOVERED
    assert outcome.orphans == {}
