"""How the server's process imports vLLM."""

import gc
import sys

import pytest

from hunyuan_vllm.server.vllm_serve import fast_imports


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
