"""Routes and limits on their way from options to the server's process."""

import json

import pytest
from typer.testing import CliRunner

from hunyuan_vllm.cli import app
from hunyuan_vllm.cli.serve import surface_of
from hunyuan_vllm.server.options import SURFACE_VARIABLE, Surface
from hunyuan_vllm.util.errors import UserError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(SURFACE_VARIABLE, raising=False)


def test_the_way_there_and_back():
    surface = surface_of(True, ["/load"], 0.5, max_queue=0, max_sequences=None, max_output_tokens=7)
    expected = dict(admin=True, extra_routes=("/load",), max_body=2**19, max_queue=0, max_output_tokens=7)
    assert surface == Surface(**expected)
    assert Surface.read(surface.environment({})) == surface


def test_by_default_nothing_is_set():
    assert surface_of(False, None, None) == Surface()
    assert Surface().environment({}) == {}
    insecure = Surface(insecure=True).environment({})
    assert Surface.read(Surface().environment(insecure)) == Surface()  # an inherited one does not shine through


def test_options_win_over_the_variable(monkeypatch):
    monkeypatch.setenv(SURFACE_VARIABLE, '{"max_queue": 5, "max_sequences": 6}')
    surface = surface_of(False, None, None, max_queue=7)
    assert (surface.max_queue, surface.max_sequences) == (7, 6)


@pytest.mark.parametrize("text", ["{", '{"max_queue": -1}', '{"max_queu": 1}', '{"max_queue": "many"}'])
def test_a_variable_that_means_nothing_is_named(monkeypatch, text):
    monkeypatch.setenv(SURFACE_VARIABLE, text)
    with pytest.raises(UserError, match=SURFACE_VARIABLE):
        surface_of(False, None, None)


def test_a_route_that_is_no_path():
    with pytest.raises(UserError, match="--allow-route load"):
        surface_of(False, ["load"], None)


def test_the_options_of_the_command():
    shown = CliRunner().invoke(app, ["serve", "--dry-run", "--max-body", "2", "--max-num-seqs", "3", "--max-queue=0"])
    assert shown.exit_code == 0, shown.output
    (setting,) = [word for word in shown.stdout.split() if word.startswith(SURFACE_VARIABLE)]
    assert json.loads(setting.split("=", 1)[1].strip("'")) == {"max_body": 2 * 2**20, "max_queue": 0}
    assert "--max-num-seqs 3" in shown.stdout and "--max-queue" not in shown.stdout
