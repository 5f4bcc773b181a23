"""FP8 checkpoints from their headers: every spelling that occurs is taken, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import fuse, rewrite, tiny_config, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, expected_tensors
from hunyuan_vllm.quant.fp8 import HunYuanFp8Config, normalised_key_scale
from hunyuan_vllm.quant.layouts import IgnoredLayers, is_quantised
from hunyuan_vllm.quant.quantization_config import static_fp8
from hunyuan_vllm.quant.rounding import E4M3, quantize_per_tensor

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
LAYER = "model.layers.1.self_attn."  # a cross layer
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def to_fp8(tensors: Tensors) -> None:
    for name in [name for name in tensors if is_quantised(name)]:
        linear = name.removesuffix(".weight")
        tensors[name], tensors[f"{linear}.weight_scale"] = quantize_per_tensor(tensors[name])
        tensors[f"{linear}.input_scale"] = torch.tensor([0.01])


def fuse_fp8(tensors: Tensors) -> None:
    """qkv_proj and gate_and_up_proj with one scale each; any rows will do here."""
    for name in [name for name in tensors if name.endswith((".k_proj.weight", ".gate_proj.weight"))]:
        module, _, projection = name.removesuffix(".weight").rpartition(".")
        parts, fused = (("q", "k", "v"), "qkv_proj") if projection == "k_proj" else (("up", "gate"), "gate_and_up_proj")
        tensors[f"{module}.{fused}.weight"] = torch.cat([tensors.pop(f"{module}.{part}_proj.weight") for part in parts])
        for scale in ("weight_scale", "input_scale"):
            tensors[f"{module}.{fused}.{scale}"] = [tensors.pop(f"{module}.{part}_proj.{scale}") for part in parts][0]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("fp8") / "model", tiny_config())
    rewrite(directory, to_fp8)
    return directory


def check(
    sound: Path, directory: Path, change: Change = lambda tensors: None, ignored: tuple[str, ...] = ()
) -> Tensors:
    """Check the headers of a changed copy; returns its tensors."""
    directory.mkdir()
    for file in sound.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    rewrite(directory, change)
    check_headers(directory, static_fp8(IgnoredLayers(ignored)).layout(HunYuanConfig.from_pretrained(directory)))
    return load_file(directory / "model.safetensors")


def cache_scales(*names: str, layers: range = range(4)) -> Change:
    """Add scales under each name, each with a value of its own: 1, 2, 3 … in the order of layers and names."""
    keys = [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names]
    return lambda tensors: tensors.update({key: torch.tensor(value + 1.0) for value, key in enumerate(keys)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: None,
        fuse_fp8,
        lambda tensors: tensors.update({name: t.reshape(1) for name, t in tensors.items() if name.endswith("_scale")}),
        lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items() if name.endswith("_scale")}),
    ],
    ids=["separate", "fused", "shape_1", "bfloat16_scales"],
)
def test_layouts(change: Change, sound: Path, tmp_path: Path) -> None:
    check(sound, tmp_path / "changed", change)


def test_fused_weights_are_taken_apart_with_their_scale(sound: Path) -> None:
    config, tensors = tiny_config(), load_file(sound / "model.safetensors")
    weights = {name: tensor for name, tensor in tensors.items() if is_quantised(name)}
    layout, parts = static_fp8(IgnoredLayers()).layout(config), {}
    for name, tensor in fuse(weights, config).items():
        parts |= dict(layout.split(name, tensor))
        if "qkv_proj" in name or "gate_and_up_proj" in name:
            scales = dict(layout.split(f"{name}_scale", torch.tensor([0.5])))
            names = ("up", "gate") if "gate_and_up" in name else "qkv"
            module = name.rpartition(".weight")[0].rpartition(".")[0]
            assert scales == {f"{module}.{part}_proj.weight_scale": torch.tensor(0.5) for part in names}
    assert parts.keys() == weights.keys()
    assert all(torch.equal(parts[name].float(), weights[name].float()) for name in weights)


@pytest.mark.parametrize(
    ("change", "k", "v"),
    [
        (cache_scales(), None, None),
        (cache_scales("kv_scale"), 3.0, 3.0),
        (cache_scales("k_scale", "v_scale"), 5.0, 6.0),
        (cache_scales("attn.k_scale", "attn.v_scale"), 5.0, 6.0),
        (cache_scales("k_proj.output_scale", "v_proj.output_scale"), 5.0, 6.0),
        (cache_scales("kv_scale", "v_scale"), 5.0, 6.0),
        (cache_scales("k_scale", "v_scale", layers=range(0, 4, 2)), 3.0, 4.0),
        (cache_scales("v_scale", layers=range(0, 4, 2)), None, 2.0),
    ],
    ids=["none", "kv", "k_v", "attn", "output", "kv_and_v", "owners_only", "v_only"],
)
def test_spellings_of_kv_scales(change: Change, k: float | None, v: float | None, sound: Path, tmp_path: Path) -> None:
    """Seen from layer 2, an owner; the checkpoint's tensors arrive in their own order."""
    tensors = check(sound, tmp_path / "changed", change)
    scheme = HunYuanFp8Config()
    layout = static_fp8(scheme.ignored).layout(tiny_config())
    for name, tensor in tensors.items():
        for part, value in layout.split(name, tensor):
            loaded = [name for name, _ in scheme.load(part, value)]
            assert not any("_proj" not in name and name.endswith("_scale") for name in loaded)
    assert (scheme.cache_scales.k(2), scheme.cache_scales.v(2)) == (k, v)


def test_one_scale_in_two_spellings(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"self_attn.k_scale' is in .* and also in"):
        check(sound, tmp_path / "changed", cache_scales("k_scale", "k_proj.output_scale"))


def spoil(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.weight_scale"), f"lacks checkpoint tensor '{EXPERT}.weight_scale'"),
        (lambda t: t.pop(f"{LAYER}q_proj.input_scale"), f"lacks checkpoint tensor '{LAYER}q_proj.input_scale'"),
        (spoil(f"{EXPERT}.weight_scale", torch.ones(96, 1)), f"'{EXPERT}.weight_scale' has shape [96, 1]; quanti"),
        (spoil(f"{LAYER}o_proj.input_scale", torch.ones(2)), f"'{LAYER}o_proj.input_scale' has shape [2]"),
        (spoil(f"{LAYER}v_scale", torch.ones(2)), f"'{LAYER}v_scale' has shape [2]"),
        (spoil(f"{LAYER}q_proj.weight", torch.ones(128, 128).bfloat16()), f"'{LAYER}q_proj.weight' is BF16 where"),
        (spoil(f"{EXPERT}.weight", torch.ones(96, 128).to(torch.float8_e5m2)), f"'{EXPERT}.weight' is F8_E5M2 whe"),
        (spoil("model.norm.weight", torch.ones(128).to(E4M3)), "'model.norm.weight' is F8_E4M3 where"),
        (spoil("model.norm.weight_scale", torch.ones(())), "'model.norm.weight_scale' is not part of"),
        (spoil(f"{LAYER}k_proj.weight_scale", torch.ones(())), f"'{LAYER}k_proj.weight_scale' is not part of"),
    ],
    ids=["missing", "missing_cross_q", "channel", "two", "kv_two", "bf16", "e5m2", "norm", "norm_scale", "cross_k"],
)  # fmt: skip
def test_misfits_are_named(change: Change, message: str, sound: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        check(sound, tmp_path / "changed", change)
    assert message in str(raised.value)


def test_fp8_weights_without_a_quantization_config(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="_scale' is not part .* config.json, whose quantization_config has no such"
    ):
        check_headers(sound, Layout(tiny_config()))
    bare = write_checkpoint(tmp_path / "bare", tiny_config())
    rewrite(bare, lambda tensors: tensors.update({f"{EXPERT}.weight": tensors[f"{EXPERT}.weight"].to(E4M3)}))
    with pytest.raises(CheckpointError, match=f"'{EXPERT}.weight' is F8_E4M3 where config.json promises BF16"):
        check_headers(bare, Layout(tiny_config()))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{EXPERT}.weight_scale", f"{LAYER}q_proj.input_scale", f"{LAYER}v_scale"])
def test_scales_that_are_no_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint tensor '{name}' is {value:g}: a scale is a positive number"):
        list(HunYuanFp8Config().load(name, torch.tensor(value)))


def test_types_are_checked_in_the_stream_too() -> None:
    scheme, name = HunYuanFp8Config(IgnoredLayers(["o_proj"])), f"{LAYER}q_proj.weight"
    with pytest.raises(CheckpointError, match=f"'{name}' is bfloat16, and config.json says that it is F8_E4M3"):
        list(scheme.load(name, torch.ones(2, 2).bfloat16()))
    with pytest.raises(CheckpointError, match="is float8_e4m3fn, and config.json says that it is unquantised"):
        list(scheme.load(f"{LAYER}o_proj.weight", torch.ones(2, 2).to(E4M3)))


SHARED = "model.layers.2.mlp.shared_mlp."
GATE_AND_UP = [f"{SHARED}gate_proj", f"{SHARED}up_proj"]


def linears(part: str) -> list[str]:
    names = [name for name in expected_tensors(tiny_config()) if is_quantised(name)]
    return [name.removesuffix(".weight") for name in names if part in name]


@pytest.mark.parametrize(
    ("entries", "ignored"),
    [
        (["lm_head", "model.layers.0.mlp.gate"], []),
        ([f"{LAYER}q_proj"], [f"{LAYER}q_proj"]),
        (["model.layers.1"], linears("model.layers.1.")),
        (["o_proj"], linears(".o_proj.")),
        (["model.layers.2.self_attn.qkv_proj"], [f"model.layers.2.self_attn.{part}_proj" for part in "qkv"]),
        ([f"{SHARED}gate_and_up_proj"], GATE_AND_UP),
        ([f"{SHARED}gate_up_proj"], GATE_AND_UP),
        (["model.layers.0.mlp.experts"], linears(".0.mlp.experts.")),
        (["re:.*shared_mlp"], linears(".shared_mlp.")),
        (["re:model.layers.[01].self_attn.o_proj"], [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]),
    ],
)
def test_ignored_layers(entries: list[str], ignored: list[str]) -> None:
    layout = static_fp8(IgnoredLayers(entries)).layout(tiny_config())
    quantised = [linear for linear in linears("") if linear not in ignored]
    assert set(layout.quantised) == set(quantised)
    scales = [f"{linear}.{kind}" for linear in quantised for kind in ("weight_scale", "input_scale")]
    assert {name for name in layout.expected if name.endswith("_scale")} == set(scales)


def test_an_ignored_weight_may_be_bfloat16(sound: Path, tmp_path: Path) -> None:
    def restore(tensors: Tensors) -> None:
        for kind in ("weight_scale", "input_scale"):
            del tensors[f"{LAYER}q_proj.{kind}"]
        tensors[f"{LAYER}q_proj.weight"] = torch.ones(128, 128).bfloat16()

    check(sound, tmp_path / "changed", restore, (f"{LAYER}q_proj",))
    with pytest.raises(
        CheckpointError, match="o_proj.input_scale' is not part .* quantization_config has no such scale"
    ):
        check(sound, tmp_path / "stored", ignored=(f"{LAYER}o_proj",))


@pytest.mark.parametrize(
    "entry",
    ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.experts.3", "model.layers.1.mlp.shared_mlp.up_proj"],
)
def test_a_product_is_ignored_whole_or_not(entry: str) -> None:
    with pytest.raises(CheckpointError, match=rf"leaves '{entry}.*' unquantised and not 'model.* in one GEMM"):
        static_fp8(IgnoredLayers([entry])).layout(tiny_config())


@pytest.mark.parametrize(
    ("quantization", "user", "model_type", "taken"),
    [
        (STATIC, None, "hunyuan", "hunyuan_fp8"),
        (STATIC, "fp8", "hunyuan", "hunyuan_fp8"),
        (STATIC, "hunyuan_fp8", "hunyuan", "hunyuan_fp8"),
        (STATIC, "hunyuan_int8", "hunyuan", None),
        (STATIC, None, "llama", None),
        ({**STATIC, "activation_scheme": "dynamic"}, None, "hunyuan", None),
        ({**STATIC, "weight_block_size": [128, 128]}, None, "hunyuan", None),
        ({"quant_method": "compressed-tensors"}, None, "hunyuan", None),
    ],
)
def test_which_checkpoints_are_taken_over(
    quantization: dict, user: str | None, model_type: str, taken: str | None
) -> None:
    hf_config = HunYuanConfig() if model_type == "hunyuan" else SimpleNamespace(model_type=model_type)
    assert HunYuanFp8Config.override_quantization_method(quantization, user, hf_config) == taken


def test_what_it_is_asked_for_by_mistake() -> None:
    with pytest.raises(
        ValueError, match=r"one static scale per tensor, and in config.json quantization_config is .*dynamic"
    ):
        HunYuanFp8Config.from_config({**STATIC, "activation_scheme": "dynamic"})
    with pytest.raises(
        CheckpointError, match="needs an FP8 checkpoint, and this one is not quantised: make one with hunyuan"
    ):
        HunYuanFp8Config().layout(tiny_config())
    with pytest.raises(ValueError, match="is for Hunyuan checkpoints; a-llama is another model"):
        HunYuanFp8Config().maybe_update_config("a-llama", SimpleNamespace(model_type="llama"))
    assert HunYuanFp8Config.from_config({**STATIC, "modules_to_not_convert": ["o_proj"]}).ignored.names == [".o_proj."]


@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_the_scale_of_normalised_keys_needs_no_calibration(head_dim: int) -> None:
    """k / rms(k) is greatest where one element has it all: sqrt(head_dim), which is then 448."""
    k = torch.zeros(head_dim)
    k[3] = -7.0
    unit = k / k.square().mean().sqrt()
    assert unit.abs().max() / normalised_key_scale(head_dim) == pytest.approx(448)
    noise = torch.randn(1000, head_dim) ** 5
    assert (noise / noise.square().mean(-1, keepdim=True).sqrt()).abs().max() / normalised_key_scale(head_dim) <= 448


def test_the_published_config_is_read() -> None:
    quantization = {**STATIC, "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"}
    config = HunYuanConfig(**json.loads(json.dumps({"quantization_config": quantization})))
    assert HunYuanFp8Config.from_config(config.quantization_config).layout(config).quantised
