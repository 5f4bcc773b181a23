"""Servers that several tests want: over a Ray cluster of two hosts (one file of tests), and behind keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hosts import Network
from keyed_server import KeyedServer, start_keyed_server
from ray_service import RayService


@pytest.fixture(scope="module")
def ray_service_of_module() -> Iterator[RayService]:
    from ray_hosts import need_ray_hosts

    need_ray_hosts()
    with Network() as network:
        yield RayService(network)


@pytest.fixture
def ray_service(ray_service_of_module: RayService) -> RayService:
    """With both nodes in the cluster and the server ready, whatever the test before did to them."""
    ray_service_of_module.bring_up()
    return ray_service_of_module


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    """A server of the demo model with several keys, TLS, limits, adapters, administrative routes and JSON logs."""
    with start_keyed_server(tmp_path_factory.mktemp("keyed")) as server:
        yield server


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """`caplog` for loggers below vLLM's, which does not hand its records on."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="vllm")
    yield caplog
    logger.removeHandler(caplog.handler)
