"""A real Prometheus scrapes a real server under load: each query of the dashboard and each rule has data."""

import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from serving import free_port, running_server

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]
GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((GRAFANA / "rules.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
VARIABLES = {"$instance": ".*", "$layer": "1", "$__rate_interval": "8s"}


@contextmanager
def load(url: str):
    """Requests of several kinds, one after the other, until the end; some are refused."""
    stop = threading.Event()
    kinds = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Why is sea water salty?"}], "n": 3}),
        ("/v1/completions", {"prompt": "Water boils at", "max_tokens": 30}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 1000}),
        ("/pause", {}),
    ]

    def run() -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not stop.wait(0.2):  # other tests run meanwhile
                for path, body in kinds:
                    client.post(path, json=body)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Prometheus:
    def __init__(self, port: int):
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)

    def get(self, path: str, **params):
        answer = self._client.get(f"/api/v1/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        return [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]

    def ready(self) -> bool:
        try:
            if self._client.get("/-/ready").status_code != 200:  # it answers before it has begun
                return False
        except httpx.TransportError:
            return False
        targets = self.get("targets")["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prometheus")
    flags = ("--supervise", "--expert-load", "--max-model-len", "256")
    with running_server(*flags) as server:
        config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
        (directory / "rules.yml").write_text((GRAFANA / "rules.yml").read_text())
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        options = [f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'data'}"]
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(
                ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )
        try:
            running = Prometheus(port)
            deadline = time.monotonic() + 30
            while not running.ready():
                assert process.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()[-3000:]
                time.sleep(0.2)
            with load(server.url):
                deadline = time.monotonic() + 60
                while not running.values("rate(vllm:request_success_total[8s]) > 0") and time.monotonic() < deadline:
                    time.sleep(0.5)
                time.sleep(6)
                yield running
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_every_query_of_the_dashboard_has_data(prometheus):
    deadline = time.monotonic() + 30
    empty = dict(QUERIES)
    while empty and time.monotonic() < deadline:  # a rate wants a few scrapes, and a slow machine a few seconds
        found = [(query, prometheus.values(query)) for _, query in QUERIES]
        empty = {query: values for query, values in found if not values or any(value != value for value in values)}
        time.sleep(1 if empty else 0)
    assert empty == {}
    assert len(QUERIES) == 33 and len(PANELS) == 21


def test_the_variables_of_the_dashboard_have_values(prometheus):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
            assert prometheus.get(f"label/{label}/values", **{"match[]": metric}), variable["name"]


def test_every_rule_is_evaluated_and_every_record_has_data(prometheus):
    (group,) = prometheus.get("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule.get("alert") or rule["record"] for rule in RULES]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}, [rule.get("lastError") for rule in group["rules"]]
    for rule in RULES:
        if "record" in rule:
            values = prometheus.values(rule["record"])
            assert values and all(value == value for value in values), rule["record"]


def test_what_each_alert_measures_is_measured(prometheus):
    """An alert is an expression against a bound: without the bound it must have data."""
    for rule in RULES:
        if "alert" in rule:
            without_labels = re.sub(r"\{.*?\}", "", rule["expr"])
            metrics = set(re.findall(r"\b(?:vllm:|hunyuan|http_|up\b)[\w:]*", without_labels))
            assert metrics and all(prometheus.values(metric) for metric in metrics), (rule["alert"], metrics)


def test_the_cache_s_tokens_are_the_engine_s(prometheus):
    (capacity,) = prometheus.values("hunyuan_kv_cache_capacity_tokens")
    whole = (
        64 * 2**20 / (3 * 2 * 4 * 32 * 2)
    )  # bytes over owner layers, K and V, heads, head size and those of bfloat16
    assert whole - 128 < capacity <= whole  # in whole blocks
    assert prometheus.values("hunyuan_cla_sharing_factor") == [2.0]
    assert all(0 <= used <= capacity for used in prometheus.values("hunyuan_kv_cache_used_tokens"))
    assert prometheus.values("hunyuan_supervisor_restarts_total") == [0.0]


def test_the_load_of_experts_is_that_of_the_tokens(prometheus):
    """With top-1 routing each token goes to one expert of each layer, so that all layers sum to the same."""
    by_layer = prometheus.values("sum by (layer) (hunyuan_expert_tokens_total)")
    assert len(by_layer) == 6 and len(set(by_layer)) == 1
    (tokens,) = prometheus.values("sum(vllm:prompt_tokens_total) + sum(vllm:generation_tokens_total)")
    assert 0.3 * tokens < by_layer[0] < 3 * tokens
