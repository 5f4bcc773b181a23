"""--lora-modules, before a server is started: `serve --dry-run`, `batch` and `eval` see it as well."""

import json
import os
from pathlib import Path

import pytest
from adapters import adapter_pairs, rename_modules, write_adapter

from hunyuan_vllm import demo
from hunyuan_vllm.batch.engine import engine_options
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.server.models import check_adapters, demo_model
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError

CONFIG = HunYuanConfig.from_pretrained(demo.path())


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "good", adapter_pairs(CONFIG))


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    directory = write_adapter(tmp_path / "wrong", adapter_pairs(CONFIG))
    return rename_modules(directory, lambda name: name.replace("self_attn.o_proj", "mlp.shared_mlp.down_proj"))


def check(*words: object, config: HunYuanConfig | None = CONFIG, cpu: bool = True) -> None:
    check_adapters(Flags(["--enable-lora", *map(str, words)]), config, cpu)


def test_accepted(good: Path, wrong: Path) -> None:
    check()
    check("--lora-modules", f"a={good}")
    check("--lora-modules", json.dumps({"name": "a", "path": str(good)}))
    check("--lora-modules", f"a={wrong}", cpu=False)  # MLP parts on GPUs
    check("--lora-modules", f"a={wrong}", config=None)  # a model on the hub
    check("--lora-modules", "a=somebody/adapter")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora-modules", "style={wrong}"], "--lora-modules style: .*mlp.shared_mlp.down_proj, and on CPUs adapters"),
        (["--lora-modules", "style=/nowhere/x"], "--lora-modules style: /nowhere/x is not a directory"),
        (["--lora-modules", "style={good}", "--max-lora-rank", "1"], "has rank 4, .* add --max-lora-rank 16"),
        (["--lora-modules", "{good}"], "is not NAME=DIRECTORY"),
    ],
)
def test_refused(good: Path, wrong: Path, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(*(word.format(good=good, wrong=wrong) for word in flags))


def test_without_lora(good: Path) -> None:
    with pytest.raises(UserError, match="--lora-modules needs --enable-lora"):
        check_adapters(Flags(["--lora-modules", f"a={good}"]), CONFIG, cpu=True)


def test_a_batch_run_refuses_it_before_the_engine(good: Path) -> None:
    rename_modules(good, lambda name: f"model.{name}")
    with pytest.raises(UserError, match="--lora-modules style: .* none of its"):
        engine_options(demo_model(), ["--enable-lora", "--lora-modules", f"style={good}"], os.environ)
