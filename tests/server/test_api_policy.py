"""Routes and limits: from the command's options to the server's process."""

import json

import pytest
from typer.testing import CliRunner

from hunyuan_vllm.cli import app
from hunyuan_vllm.cli.serve import api_policy
from hunyuan_vllm.server.options import POLICY_VARIABLE, ApiPolicy
from hunyuan_vllm.util.errors import UserError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(POLICY_VARIABLE, raising=False)


def test_the_way_there_and_back():
    policy = api_policy(
        admin=True, routes=["/load"], max_body=0.5, max_queue=0, max_sequences=None, max_output_tokens=7
    )
    expected = dict(admin=True, extra_routes=("/load",), max_body=2**19, max_queue=0, max_output_tokens=7)
    assert policy == ApiPolicy(**expected)
    assert ApiPolicy.read(policy.environment({})) == policy


def test_by_default_nothing_is_set():
    assert api_policy() == ApiPolicy()
    assert ApiPolicy().environment({}) == {}
    insecure = ApiPolicy(insecure=True).environment({})
    assert ApiPolicy.read(ApiPolicy().environment(insecure)) == ApiPolicy()  # an inherited one does not shine through


def test_options_win_over_the_variable(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"max_queue": 5, "max_sequences": 6}')
    policy = api_policy(max_queue=7)
    assert (policy.max_queue, policy.max_sequences) == (7, 6)


@pytest.mark.parametrize("text", ["{", '{"max_queue": -1}', '{"max_queu": 1}', '{"max_queue": "many"}'])
def test_a_variable_that_means_nothing_is_named(monkeypatch, text):
    monkeypatch.setenv(POLICY_VARIABLE, text)
    with pytest.raises(UserError, match=POLICY_VARIABLE):
        api_policy()


def test_a_route_that_is_no_path():
    with pytest.raises(UserError, match="--allow-route load"):
        api_policy(routes=["load"])


def test_the_options_of_the_command():
    shown = CliRunner().invoke(app, ["serve", "--dry-run", "--max-body", "2", "--max-num-seqs", "3", "--max-queue=0"])
    assert shown.exit_code == 0, shown.output
    (setting,) = [word for word in shown.stdout.split() if word.startswith(POLICY_VARIABLE)]
    assert json.loads(setting.split("=", 1)[1].strip("'")) == {"max_body": 2 * 2**20, "max_queue": 0}
    assert "--max-num-seqs 3" in shown.stdout and "--max-queue" not in shown.stdout
