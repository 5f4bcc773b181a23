"""A host that falls silent while it works on a request: nothing tells the router but silence."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import Network, need_hosts
from hosts.network import Host
from routers import CONFIG, HAPROXY, needs_haproxy
from waiting import eventually

pytestmark = needs_haproxy
REPLICA = Path(__file__).with_name("slow_replica.py")
PORT = 8020
ANSWERED = 15.0  # seconds
ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", data=sys.argv[1].encode())
try:
    print(urllib.request.urlopen(request, timeout=60).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    need_hosts()
    with Network() as network, ExitStack() as ending:
        made = {name: network.add(name) for name in ("router", "one", "two")}
        for name in ("one", "two"):
            ending.callback(made[name].start(sys.executable, REPLICA, made[name].address, str(PORT)).kill)
        replicas = {
            f"REPLICA_{number}": f"{made[name].address}:{PORT}" for number, name in enumerate(("one", "two"), 1)
        }
        environ = Host.environment(**replicas)
        ending.callback(made["router"].start(HAPROXY, "-db", "-f", CONFIG, env=environ, stdout=subprocess.DEVNULL).kill)
        yield made


def ask(router: Host, prompt: str) -> str:
    done = router.run(sys.executable, "-c", ASK, json.dumps({"prompt": prompt}), check=False)
    return done.stdout.strip()


def test_a_silent_host_holds_no_request_for_long(hosts):
    router, one = hosts["router"], hosts["one"]
    beginning = "The same for all: " + "-" * 300
    eventually(lambda: {ask(router, f"{number} {beginning}") for number in range(4)} == {"one", "two"})
    mine = next(prompt for number in range(50) if ask(router, prompt := f"{number} {beginning}") == "one")
    slow = json.dumps({"prompt": f"{mine} slow on one"})
    asked = router.start(sys.executable, "-c", ASK, slow, stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    one.unplug()
    silent = time.monotonic()
    assert asked.communicate(timeout=60)[0].strip() == "502"
    assert time.monotonic() - silent < ANSWERED
    assert {ask(router, f"{number} {beginning}") for number in range(4)} == {"two"}
    one.plug()
    eventually(lambda: ask(router, mine) == "one")
