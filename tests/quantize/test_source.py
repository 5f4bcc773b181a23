"""Reading a checkpoint: fused or not, and every way in which it is of no use, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import rewrite, tiny_config, write_checkpoint

from hunyuan_vllm.quantize.source import Source, read_bf16_config
from hunyuan_vllm.util.errors import UserError

FP8 = torch.float8_e4m3fn
NAME = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Callable], Path]:
    def make(change: Callable) -> Path:
        directory = write_checkpoint(tmp_path / "src", tiny_config(num_hidden_layers=2))
        rewrite(directory, change)
        return directory

    return make


def test_fused_spellings_read_the_same(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    plain = Source(write_checkpoint(tmp_path / "plain", config))
    fused = Source(write_checkpoint(tmp_path / "fused", config, fused=True, stray=True))
    assert plain.shapes == fused.shapes
    for name, shape in plain.shapes.items():
        assert torch.equal(plain.read(name), fused.read(name)), name
        assert plain.nbytes(name) == plain.read(name).nbytes and plain.read(name).shape == shape
    assert plain.fingerprint() != fused.fingerprint()


def test_files_that_are_copied(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "src", tiny_config(), shard_bytes=100_000)
    kept = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "hy.tiktoken", "tokenizer.json"]
    for name in [*kept, ".gitattributes", "old.bin", "pytorch_model.bin.index.json", "hunyuan.py", "SHA256SUMS"]:
        (directory / name).write_text("x")
    assert [file.name for file in Source(directory).other_files()] == kept


def test_nan_names_the_tensor(broken: Callable[[Callable], Path]) -> None:
    def change(tensors: dict) -> None:
        tensors[NAME][0, 0] = float("nan")

    source = Source(broken(change))
    with pytest.raises(UserError, match=f"'{NAME}' in .*model.safetensors holds NaN"):
        source.read(NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks checkpoint tensor '{NAME}'"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}), f"'{NAME}' has shape"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].to(FP8)}), "is F8_E4M3 where config.json promises BF16"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].char()}), "is I8 where config.json promises BF16"),
        (lambda tensors: tensors.update(x=tensors[NAME].clone()), "'x' is not part of this network"),
    ],
    ids=["missing", "misshapen", "fp8", "int8", "unknown"],
)
def test_wrong_tensors(broken: Callable[[Callable], Path], change: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Source(broken(change))


def test_a_file_cut_short(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cut = tmp_path / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError, match="00002-of-00002.safetensors is truncated"):
        Source(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantised \(fp8\): give the BF16 checkpoint"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
    ],
)
def test_configs_of_no_use(tiny: Path, tmp_path: Path, fields: dict, message: str) -> None:
    given = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | fields))
    with pytest.raises(UserError, match=message):
        read_bf16_config(tmp_path)


def test_directories_of_no_use(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tencent/x does not exist: name a checkpoint's directory; one on the hub"):
        Source(Path("tencent/x"))
    with pytest.raises(UserError, match="has no config.json"):
        Source(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(UserError, match=r"has pickled weights \(\*\.bin\) and no \*\.safetensors: convert"):
        Source(tmp_path)
