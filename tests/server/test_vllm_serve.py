"""How the server's process imports vLLM."""

import gc
import sys

import pytest

from hunyuan_vllm.server.vllm_serve import fast_imports, main


def test_unused_packages_are_absent_only_while_the_server_starts(monkeypatch):
    monkeypatch.setenv("HUNYUAN_VLLM_UNUSED_PACKAGES", "this sys")
    monkeypatch.delitem(sys.modules, "this", raising=False)
    try:
        with fast_imports():
            assert not gc.isenabled()
            with pytest.raises(ImportError):
                import this
        assert gc.isenabled()
        assert "this" not in sys.modules and sys.modules["sys"] is sys  # what was imported before stays
        import this  # noqa: F401
    finally:
        gc.unfreeze()


def test_the_options_are_those_of_vllms_command(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "argv", ["vllm_serve", "serve", "--help=max-model-len"])
    try:
        with pytest.raises(SystemExit, match="^0$"):
            main()
    finally:
        gc.unfreeze()
    assert "--max-model-len" in capsys.readouterr().out
