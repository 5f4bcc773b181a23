"""What HAProxy sends again: a request that found no connection, once; nothing that reached a replica."""

import pytest
from routers import Failing, Router, failing, needs_haproxy, running_router
from serving import free_port

pytestmark = needs_haproxy


def statuses(router: Router, count: int) -> list[int]:
    return [router.ask("You are a helpful assistant.", f"{number}?").status_code for number in range(count)]


@pytest.mark.parametrize(("status", "shown"), [(None, 502), (500, 500), (502, 502), (503, 503), (504, 504), (429, 429)])
def test_what_reached_a_replica_is_sent_once(status, shown):
    with failing(status, status, status) as addresses, running_router(*addresses) as router:
        assert statuses(router, 1) == [shown]
        assert Failing.received == 1


def test_what_found_no_connection_is_sent_to_another_replica():
    with failing(200) as addresses, running_router(*addresses, f"127.0.0.1:{free_port()}") as router:
        # Enough of them for some to be meant for the one that is not there, before the router has noticed.
        assert statuses(router, 12) == [200] * 12
        assert Failing.received == 12
        assert router.metric("haproxy_server_redispatch_warnings_total", "replica-2") >= 1
