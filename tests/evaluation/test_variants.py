"""Schemes by name, the options they stand for, and what cannot be combined."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hunyuan_vllm import demo
from hunyuan_vllm.evaluation import compare
from hunyuan_vllm.evaluation.engines import EngineRun, Variant, checkpoint_of
from hunyuan_vllm.evaluation.passages import Passage
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import PACKED
from hunyuan_vllm.quant.quantization_config import describe, stored_format
from hunyuan_vllm.server.models import ModelSource, demo_model
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

SILENT = Console(quiet=True)


@pytest.mark.parametrize(
    ("text", "scheme", "options"),
    [
        ("bf16", ("bf16", "bf16", "bf16", None), []),
        ("int8", ("int8", "int8", "bf16", None), ["--quantization", "hunyuan_int8"]),
        ("int8-w8a8", ("int8-w8a8", "int8-w8a8", "bf16", None), ["--quantization", "hunyuan_int8_w8a8"]),
        ("kv-fp8", ("kv-fp8", "bf16", "fp8", None), ["--kv-cache-dtype", "fp8"]),
        ("fp8:/m/f:8", ("fp8", "fp8", "fp8", "/m/f:8"), ["--kv-cache-dtype", "fp8"]),
        ("fp8+kv-bf16", ("fp8+kv-bf16", "fp8", "bf16", None), []),
        (
            "int8+kv-fp8",
            ("int8+kv-fp8", "int8", "fp8", None),
            ["--quantization", "hunyuan_int8", "--kv-cache-dtype", "fp8"],
        ),
    ],
)
def test_names(text: str, scheme: tuple[str, str, str, str | None], options: list[str]) -> None:
    parsed = Variant.parse(text)
    assert (parsed.name, parsed.weights.name, parsed.cache, parsed.path) == scheme
    assert parsed.options(quantised=False) == options
    assert "--quantization" not in parsed.options(quantised=True)


@pytest.mark.parametrize("text", ["", "fp4", "int8+fp8", "bf16+kv-int8", "kv-fp8+int8", "/models/x"])
def test_no_such_scheme(text: str) -> None:
    with pytest.raises(UserError, match="is not a scheme: use one of bf16, int8, int8-w8a8, fp8, int4, kv-fp8"):
        Variant.parse(text)


STATIC_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}


def quantised(described: dict) -> ModelSource:
    """The demo model, if it were stored like this."""
    model = demo_model()
    fields = json.loads((demo.path() / "config.json").read_text())
    config = Network.read(fields | {"quantization_config": described})
    return replace(model, demo=False, config=config, format=stored_format(described))


@pytest.mark.parametrize(
    ("scheme", "described", "name"),
    [("bf16", STATIC_FP8, "FP8"), ("int8", STATIC_FP8, "FP8"), ("fp8", describe(PACKED), "int8")],
)
def test_a_checkpoint_of_another_kind(scheme: str, described: dict, name: str) -> None:
    model = quantised(described)
    with pytest.raises(UserError, match=rf"is .*{name}.*, and {scheme} starts from "):
        checkpoint_of(Variant.parse(scheme), model, Progress(SILENT))


def test_an_int8_checkpoint_says_itself_what_it_is() -> None:
    model = quantised(describe(PACKED))
    scheme = Variant.parse("int8")
    assert checkpoint_of(scheme, model, Progress(SILENT)) is model
    argv, _ = EngineRun(scheme, model).argv(64, {})
    assert "--quantization" not in argv


def test_only_the_demo_model_is_converted_unasked() -> None:
    for model in (ModelSource("tencent/Large", "tencent/Large"), ModelSource("/m", "/m", demo_model().config)):
        message = f"{model.given} is unquantised, .*: make one with hunyuan-vllm quantize {model.given} DESTINATION"
        with pytest.raises(UserError, match=message):
            checkpoint_of(Variant.parse("fp8"), model, Progress(SILENT))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--quantization", "fp8"], "--quantization is set by the evaluation"),
        (["--max-model-len=64"], "--max-model-len is set by the evaluation"),
        (["--enable-prefix-caching"], "--enable-prefix-caching is set by the evaluation"),
        (["--data-parallel-size", "2"], "--data-parallel-size: an evaluation runs one replica"),
        (["--api-key", "x"], "--api-key would show the key"),
    ],
)
def test_flags_that_are_not_the_user_s_to_give(flags: list[str], says: str, tmp_path: Path) -> None:
    """Found before any engine starts."""
    passages = [Passage([1, 2], [1])]
    with pytest.raises(UserError, match=says):
        compare.measure(demo_model(), Variant.parse("bf16"), [Variant.parse("int8")], passages, flags, tmp_path, SILENT)


def test_the_user_s_flags_win() -> None:
    argv, _ = EngineRun(Variant.parse("bf16"), demo_model()).argv(64, {})
    assert "--enforce-eager" in argv and argv[argv.index("--dtype") + 1] == "bfloat16"
    argv, _ = EngineRun(Variant.parse("bf16"), demo_model(), ["--dtype", "float32", "--no-enforce-eager"]).argv(64, {})
    assert "--enforce-eager" not in argv and argv.count("--dtype") == 1


def test_no_room_for_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    passages, bf16 = [Passage([1, 2, 3, 4] * 200, list(range(1, 800)))], Variant.parse("bf16")
    for flags, size in (([], "3.3"), (["--dtype", "float32"], "6.5"), (["--dtype=float32"], "6.5")):
        with pytest.raises(UserError, match=f"logits of 799 tokens need {size} MB, .* has 0.0 MB free: .*--work"):
            compare.measure(demo_model(), bf16, [bf16], passages, flags, tmp_path, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_no_such_directory_for_them(tmp_path: Path) -> None:
    passages = [Passage([1, 2], [1])]
    with pytest.raises(UserError, match="--work .*none: No such file"):
        compare.measure(
            demo_model(), Variant.parse("bf16"), [Variant.parse("bf16")], passages, [], tmp_path / "none", SILENT
        )
