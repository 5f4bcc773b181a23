"""The Prometheus rules: each alert fires on what it is about, and none on a healthy server."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

RULES = Path(__file__).parents[2] / "deploy" / "grafana" / "rules.yml"
MINUTE = "1m"
pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")

ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]
STEADY = "0+600x60"  # a counter at 10 a second
HEALTHY = {
    'up{job="hunyuan-vllm",instance="a"}': "1x60",
    'vllm:num_requests_running{instance="a"}': "3x60",
    'vllm:num_requests_waiting{instance="a"}': "0x60",
    'vllm:generation_tokens_total{instance="a"}': STEADY,
    'vllm:prompt_tokens_total{instance="a"}': STEADY,
    'vllm:num_preemptions_total{instance="a"}': "0x60",
    'vllm:time_to_first_token_seconds_bucket{instance="a",le="1"}': STEADY,
    'vllm:time_to_first_token_seconds_bucket{instance="a",le="20"}': STEADY,
    'vllm:time_to_first_token_seconds_bucket{instance="a",le="+Inf"}': STEADY,
    'hunyuan_requests_answered_total{instance="a",status="2xx"}': STEADY,
    'hunyuan_requests_answered_total{instance="a",status="5xx"}': "0x60",
    'hunyuan_kv_cache_used_tokens{instance="a"}': "500x60",
    'hunyuan_kv_cache_capacity_tokens{instance="a"}': "1000x60",
    'hunyuan_supervisor_restarts_total{instance="a"}': "0x60",
    'hunyuan_requests_refused_total{instance="a",reason="queue"}': "0x60",
    'hunyuan_requests_refused_total{instance="a",reason="key"}': "0x60",
}
ILLS = {
    "HunyuanDown": {'up{job="hunyuan-vllm",instance="a"}': "0x60"},
    "HunyuanStalled": {
        'vllm:generation_tokens_total{instance="a"}': "7x60",
        'vllm:prompt_tokens_total{instance="a"}': "7x60",
    },
    "HunyuanRestarting": {'hunyuan_supervisor_restarts_total{instance="a"}': "0x30 1 2 3 4x26"},
    "HunyuanServerErrors": {'hunyuan_requests_answered_total{instance="a",status="5xx"}': "0+30x60"},
    "HunyuanTurningAway": {'hunyuan_requests_refused_total{instance="a",reason="queue"}': STEADY},
    "HunyuanQueueing": {'vllm:num_requests_waiting{instance="a"}': "4x60"},
    "HunyuanSlowFirstToken": {'vllm:time_to_first_token_seconds_bucket{instance="a",le="1"}': "0x60"},
    "HunyuanPreempting": {'vllm:num_preemptions_total{instance="a"}': STEADY},
    "HunyuanKvCacheFull": {'hunyuan_kv_cache_used_tokens{instance="a"}': "990x60"},
    "HunyuanWrongKeys": {'hunyuan_requests_refused_total{instance="a",reason="key"}': STEADY},
}


def case(series: dict[str, str], fires: str | None) -> dict:
    """A test of promtool: after an hour of `series`, one alert fires and no other."""
    expected = []
    for rule in ALERTS:
        alerts = []
        if rule["alert"] == fires:
            labels = {**rule["labels"], "instance": "a"} | ({"job": "hunyuan-vllm"} if fires == "HunyuanDown" else {})
            said = {key: text.replace("{{ $labels.instance }}", "a") for key, text in rule["annotations"].items()}
            alerts = [{"exp_labels": labels, "exp_annotations": said}]
        expected.append({"eval_time": "59m", "alertname": rule["alert"], "exp_alerts": alerts})
    given = [{"series": name, "values": values} for name, values in series.items()]
    return {"interval": MINUTE, "input_series": given, "alert_rule_test": expected}


def test_every_alert_has_its_ill():
    assert {rule["alert"] for rule in ALERTS} == set(ILLS)


def test_each_alert_fires_on_its_ill_and_on_nothing_else(tmp_path):
    cases = [case(HEALTHY, None)] + [case(HEALTHY | ill, alert) for alert, ill in ILLS.items()]
    file = tmp_path / "rules_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": MINUTE, "tests": cases}))
    tested = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_configuration_is_valid():
    config = RULES.with_name("prometheus.yml")
    checked = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(ALERTS) == 10
