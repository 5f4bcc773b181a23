"""A whole conversion: the files, and every tensor against a quantisation of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, rewrite, tiny_config, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.quant.fp8 import HunYuanFp8Config
from hunyuan_vllm.quant.int8 import Int8Config, Int8W8A8Config
from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.writer import ShardWriter
from hunyuan_vllm.util.errors import UserError

Documents = list[list[int]]
Stored = Callable[[Path], dict[str, Tensor]]
CONFIGS = {"fp8": HunYuanFp8Config, "int8": Int8Config, "int8-w8a8": Int8W8A8Config}


def fp8(weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    scale = torch.stack([weight.float().abs().max() for weight in weights]).max() / 448
    return [(weight.float() * (1 / scale)).to(torch.float8_e4m3fn) for weight in weights], scale


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().char(), scale


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, tiny: Path, documents: Documents) -> Callable[[str], Path]:
    """The tiny checkpoint in a scheme."""
    directory = tmp_path_factory.mktemp("converted")

    def convert(scheme: str) -> Path:
        if not (directory / scheme).exists():
            quantize_checkpoint(tiny, directory / scheme, scheme, calibration=documents)
        return directory / scheme

    return convert


def test_fp8_weights_and_what_is_fused_shares_scales(
    converted: Callable[[str], Path], tiny: Path, stored: Stored
) -> None:
    written, source = stored(converted("fp8")), stored(tiny)
    fused = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    checked = 0
    for stem in {name.removesuffix(".weight").rpartition(".")[0] for name in source if "_proj.weight" in name}:
        for parts in fused:
            names = [f"{stem}.{part}" for part in parts if f"{stem}.{part}.weight" in source]
            if not names:
                continue
            levels, scale = fp8([source[f"{name}.weight"] for name in names])
            for name, level in zip(names, levels, strict=True):
                assert same_bytes(written[f"{name}.weight"], level), name
                assert written[f"{name}.weight_scale"] == scale and written[f"{name}.weight_scale"].shape == ()
                assert written[f"{name}.input_scale"] == written[f"{names[0]}.input_scale"] > 0
                checked += 1
    assert checked == sum(name.endswith("_proj.weight") for name in source)
    for layer in range(4):
        for kind in ("gate", "down"):
            scales = {float(written[f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.input_scale"]) for e in range(4)}
            assert len(scales) == 1
    kv = {name for name in written if name.endswith(("k_scale", "v_scale"))}
    assert kv == {f"model.layers.{owner}.self_attn.{part}_scale" for owner in (0, 2) for part in "kv"}


@pytest.mark.parametrize("scheme", ["int8", "int8-w8a8"])
def test_int8_weights(converted: Callable[[str], Path], tiny: Path, stored: Stored, scheme: str) -> None:
    written, source = stored(converted(scheme)), stored(tiny)
    for name, weight in source.items():
        if not name.endswith("_proj.weight"):
            continue
        stem = name.removesuffix(".weight")
        levels, scale = int8(weight)
        assert torch.equal(written[f"{stem}.weight_scale"], scale)
        if scheme == "int8-w8a8":
            assert torch.equal(written[name], levels)
            continue
        assert written[f"{stem}.weight_shape"].tolist() == list(weight.shape)
        packed = written[f"{stem}.weight_packed"].view(torch.uint8).to(torch.int16) - 128
        assert torch.equal(packed.char(), levels)


@pytest.mark.parametrize("scheme", CONFIGS)
def test_the_rest_is_as_it_was(converted: Callable[[str], Path], tiny: Path, stored: Stored, scheme: str) -> None:
    written, source = stored(converted(scheme)), stored(tiny)
    kept = [name for name in source if not name.endswith("_proj.weight")]
    assert len(kept) > 15 and all(same_bytes(written[name], source[name]) for name in kept)
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (tiny, converted(scheme)))
    quantization = after.pop("quantization_config")
    assert after == before
    routers = [f"model.layers.{layer}.mlp.gate.wg" for layer in range(4)]
    assert quantization.get("ignore", quantization.get("ignored_layers")) == ["lm_head", *routers]


@pytest.mark.parametrize("scheme", CONFIGS)
@pytest.mark.parametrize("variant", ["biases", "cla_factor_3", "per_layer_fields"])
def test_our_loader_expects_these_tensors(tmp_path: Path, documents: Documents, scheme: str, variant: str) -> None:
    config = tiny_config(**VARIANTS.get(variant, {}))
    source = write_checkpoint(tmp_path / "src", config)
    quantize_checkpoint(source, tmp_path / "dst", scheme, calibration=documents[:1])
    quantization = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    taken_by = [c for c in CONFIGS.values() if c.override_quantization_method(quantization, None, config) == c.name]
    assert taken_by == [CONFIGS[scheme]]
    config.quantization_config = quantization
    assert check_headers(tmp_path / "dst", CONFIGS[scheme].from_config(quantization).layout(config)) > 50


def test_fused_spellings_convert_to_the_same_bytes(tmp_path: Path, documents: Documents) -> None:
    config = tiny_config(num_hidden_layers=2)
    for name, fused in (("plain", False), ("fused", True)):
        source = write_checkpoint(tmp_path / name, config, fused=fused, stray=fused)
        quantize_checkpoint(source, tmp_path / f"{name}-fp8", "fp8", calibration=documents)
    files = [(tmp_path / f"{name}-fp8" / "model.safetensors").read_bytes() for name in ("plain", "fused")]
    assert files[0] == files[1]


def test_shards_hold_the_same_tensors(
    tmp_path: Path, converted: Callable[[str], Path], tiny: Path, stored: Stored
) -> None:
    target = tmp_path / "small"
    quantize_checkpoint(tiny, target, "int8-w8a8", shard_bytes=150_000)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 4 and all(file.stat().st_size < 180_000 for file in files)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for file in files:
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(load_file(file))
    whole, parts = stored(converted("int8-w8a8")), stored(target)
    assert whole.keys() == parts.keys() and all(same_bytes(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())


def test_other_files_come_along(tmp_path: Path, tiny: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for file in tiny.iterdir():
        (source / file.name).hardlink_to(file)
    (source / "generation_config.json").write_text('{"top_k": 20}')
    (source / "hy.tiktoken").write_bytes(b"IQ== 0\n")
    quantize_checkpoint(source, tmp_path / "dst", "int8")
    assert (tmp_path / "dst" / "generation_config.json").read_text() == '{"top_k": 20}'
    assert (tmp_path / "dst" / "hy.tiktoken").read_bytes() == b"IQ== 0\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]  # no .partial is left


def test_a_checkpoint_in_float16_keeps_its_type(tmp_path: Path, documents: Documents, stored: Stored) -> None:
    source = write_checkpoint(tmp_path / "src", tiny_config(num_hidden_layers=2))
    rewrite(source, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    quantize_checkpoint(source, tmp_path / "dst", "fp8", calibration=documents)
    assert stored(tmp_path / "dst")["model.norm.weight"].dtype == torch.float16
    with pytest.raises(UserError, match="--smooth: float16 weights"):
        quantize_checkpoint(source, tmp_path / "smooth", "fp8", calibration=documents, smooth=0.5)


def test_widths_that_do_not_pack(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", tiny_config(num_hidden_layers=2, intermediate_size=98))
    with pytest.raises(UserError, match="intermediate_size of layer 0 is 98, which is not a multiple of 4: use"):
        quantize_checkpoint(source, tmp_path / "dst", "int8")
    quantize_checkpoint(source, tmp_path / "dst", "int8-w8a8")


def test_nan_stops_it_before_anything_is_at_the_target(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", tiny_config(num_hidden_layers=2))
    name = "model.layers.1.self_attn.o_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 3] = float("inf")

    rewrite(source, change)
    with pytest.raises(UserError, match=f"'{name}' .* holds NaN or infinite values"):
        quantize_checkpoint(source, tmp_path / "dst", "int8")
    assert not (tmp_path / "dst").exists()


class TestVerification:
    """A file that differs from its source is not taken."""

    @pytest.mark.parametrize(
        ("scheme", "part"),
        [*product(CONFIGS, ["weight", "kept", "scale"]), ("fp8", "input"), ("fp8", "cache")],
    )
    def test_a_flipped_bit_is_found(
        self, tmp_path: Path, tiny: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch, scheme: str, part: str
    ) -> None:
        written = {"int8": "weight_packed"}.get(scheme, "weight")
        name = {
            "weight": f"model.layers.1.mlp.experts.1.down_proj.{written}",
            "scale": "model.layers.1.mlp.experts.1.down_proj.weight_scale",
            "kept": "model.layers.1.mlp.gate.wg.weight",
            "input": "model.layers.1.mlp.experts.1.down_proj.input_scale",
            "cache": "model.layers.0.self_attn.v_scale",
        }[part]
        ends = ShardWriter.__exit__

        def damage(self: ShardWriter, *given: object) -> None:
            ends(self, *given)
            (file,) = (tmp_path / "dst.partial" / "checkpoint").glob(".model*")
            start = int.from_bytes(file.read_bytes()[:8], "little") + 8
            place = json.loads(file.read_bytes()[8:start])[name]["data_offsets"][0] + start
            with file.open("r+b") as damaged:
                damaged.seek(place + 2)  # of a float32, a part that counts
                byte = damaged.read(1)[0]
                damaged.seek(place + 2)
                damaged.write(bytes([byte ^ 0x10]))

        monkeypatch.setattr(ShardWriter, "__exit__", damage)
        with pytest.raises(UserError, match=r"model.layers.[01].(mlp|self_attn).*(read|reads) back"):
            quantize_checkpoint(tiny, tmp_path / "dst", scheme, calibration=documents[:1])
        assert not (tmp_path / "dst").exists()


def test_the_report_measures_what_is_on_the_disk(
    tmp_path: Path, tiny: Path, documents: Documents, stored: Stored
) -> None:
    report = quantize_checkpoint(tiny, tmp_path / "dst", "fp8", calibration=documents)
    assert json.loads((tmp_path / "dst" / "quantize_report.json").read_text()) == report
    written, source = stored(tmp_path / "dst"), stored(tiny)
    assert len(report["projections"]) == sum(name.endswith("_proj.weight") for name in source)
    for one in report["projections"]:
        name = one["projection"]
        weight = source[f"{name}.weight"].float()
        decoded = written[f"{name}.weight"].float() * written[f"{name}.weight_scale"]
        assert one["relative_error"] == pytest.approx(float((decoded - weight).norm() / weight.norm()), rel=1e-4)
        assert one["input_scale"] == float(written[f"{name}.input_scale"])
        assert 0.01 < one["output_error"] < 0.08
    assert report["written_bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert report["source_bytes"] == sum(map(Source(tiny).nbytes, source))
    assert report["calibration"]["tokens"] == 250
    errors = [one["relative_error"] for one in report["projections"]]
    assert 0.02 < max(errors) < 0.04


def test_layouts_agree_on_what_a_bf16_checkpoint_is(tiny: Path) -> None:
    assert set(Source(tiny).shapes) == set(Layout(Source(tiny).config).expected)
