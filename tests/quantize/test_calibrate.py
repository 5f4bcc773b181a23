"""Layer-by-layer calibration sees what a whole forward pass of the plain model sees."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VARIANTS, rewrite, tiny_config, write_checkpoint
from rich.console import Console
from torch import Tensor, nn

from hunyuan_vllm.quantize import calibrate
from hunyuan_vllm.quantize.calibrate import ActivationScales, Calibration
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.texts import Tokens, pack
from hunyuan_vllm.quantize.writer import Workspace
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress


def calibrated(directory: Path, target: Path, tokens: Tokens) -> Calibration:
    source = Source(directory)
    workspace = Workspace(target, {})
    with workspace:
        calibration = Calibration(source, workspace)
        calibration.run(tokens, "cpu", Progress(Console(quiet=True)))
    return calibration


def widen(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()


def seen_by_a_whole_pass(directory: Path, documents: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest magnitude of each input channel of every projection, and of each output channel of v_proj."""
    model = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    values: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):

            def hook(_: Any, given: tuple[Tensor], out: Tensor, name: str = name) -> None:
                if given[0].numel():
                    inputs[name].append(given[0].flatten(0, -2).abs().amax(0).float())
                    values[name].append(out.flatten(0, -2).abs().amax(0).float())

            module.register_forward_hook(hook)
    with torch.inference_mode():
        for document in documents:
            model(torch.tensor([document]))
    return (
        {name: torch.stack(found).amax(0) for name, found in inputs.items()},
        {name: torch.stack(found).amax(0) for name, found in values.items() if name.endswith("v_proj")},
    )


@pytest.mark.parametrize(
    "variant", ["tiny", "biases", "cla_factor_3", "per_layer_fields", "no_qk_norm", "rope_plain", "tied"]
)
def test_channels_as_in_a_whole_pass(
    tmp_path: Path, variant: str, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "ENOUGH", 0)  # experts see what is routed to them, no more
    config = tiny_config(**VARIANTS.get(variant, {}))
    directory = write_checkpoint(tmp_path / "src", config)
    rewrite(directory, widen)  # in bfloat16 a packed row rounds otherwise than a document alone, and routes differ
    calibration = calibrated(directory, tmp_path / "out", pack(documents, 10_000, 320))
    inputs, values = seen_by_a_whole_pass(directory, documents)
    checked = 0
    for layer in range(config.num_hidden_layers):
        stats = calibration.layer(layer)
        for name, amax in stats.inputs.items():
            torch.testing.assert_close(amax, inputs[f"model.layers.{layer}.{name}"], rtol=1e-4, atol=1e-4)
            checked += 1
        if config.is_cross(layer):
            assert stats.v_amax is None
        else:
            v_amax = values[f"model.layers.{layer}.self_attn.v_proj"]
            torch.testing.assert_close(stats.v_amax, v_amax, rtol=1e-4, atol=1e-4)
    kept = [name for name in inputs if not name.endswith(("k_proj", "v_proj", "up_proj"))]
    assert checked == len(kept) > 4 * config.num_hidden_layers


def test_columns_are_those_of_the_weights(tiny: Path, tmp_path: Path, documents: list[list[int]]) -> None:
    calibration = calibrated(tiny, tmp_path / "out", pack(documents, 100, 320))
    source = Source(tiny)
    for layer in range(4):
        columns = calibration.layer(layer).columns
        quantised = [name for name in source.shapes if name.startswith(f"model.layers.{layer}.") and "_proj." in name]
        assert len(columns) == len(quantised)
        for name, amax in columns.items():
            assert torch.equal(amax, source.read(f"model.layers.{layer}.{name}.weight").float().abs().amax(0))


def test_experts_that_see_little_are_shown_the_likeliest_tokens(tiny: Path, tmp_path: Path) -> None:
    few = pack([list(range(3, 13))], 10, 320)  # ten tokens, four experts
    calibration = calibrated(tiny, tmp_path / "out", few)
    idle = calibration.idle_experts()
    assert len(idle) == 16 and any(one["routed"] == 0 for one in idle)
    assert sum(one["routed"] for one in idle if one["layer"] == 0) == 10
    for one in idle:
        stats = calibration.layer(one["layer"])
        gate = f"mlp.experts.{one['expert']}.gate_proj"
        # It has seen all ten, since there are no more than that.
        assert torch.equal(stats.inputs[gate], stats.inputs["mlp.shared_mlp.gate_proj"])
        down = stats.inputs[f"mlp.experts.{one['expert']}.down_proj"]
        assert (down > 0).all()


def test_it_goes_on_after_the_last_finished_layer(
    tiny: Path, tmp_path: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = pack(documents, 200, 320)
    whole = calibrated(tiny, tmp_path / "whole", tokens)
    wanted = [whole.layer(layer).to_tensors() for layer in range(4)]
    made: list[int] = []
    real = calibrate.ObservedLayer.__init__

    def third_fails(self: calibrate.ObservedLayer, config: Any, layer: int, *rest: Any) -> None:
        made.append(layer)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        real(self, config, layer, *rest)

    monkeypatch.setattr(calibrate.ObservedLayer, "__init__", third_fails)
    with pytest.raises(KeyboardInterrupt):
        calibrated(tiny, tmp_path / "cut", tokens)
    again = calibrated(tiny, tmp_path / "cut", tokens)
    assert made == [0, 1, 2, 2, 3]
    for layer in range(4):
        found = again.layer(layer).to_tensors()
        assert found.keys() == wanted[layer].keys()
        assert all(torch.equal(found[key], wanted[layer][key]) for key in found)


def test_scales_of_inputs_and_cache(tiny: Path, tmp_path: Path, documents: list[list[int]]) -> None:
    calibration = calibrated(tiny, tmp_path / "out", pack(documents, 1000, 320))
    config = Source(tiny).config
    scales = ActivationScales(config, calibration.layer)
    stats = calibration.layer(1)
    for kind in ("gate", "down"):
        largest = max(float(stats.inputs[f"mlp.experts.{e}.{kind}_proj"].max()) for e in range(4))
        for expert in range(4):
            assert float(scales.input_scale(1, f"mlp.experts.{expert}.{kind}_proj")) == pytest.approx(largest / 448)
    assert scales.input_scale(1, "mlp.experts.0.up_proj") == scales.input_scale(1, "mlp.experts.3.gate_proj")
    assert scales.input_scale(0, "self_attn.v_proj") == scales.input_scale(0, "self_attn.q_proj")
    k_scale, v_scale = scales.cache_scales(2)
    assert float(k_scale) == pytest.approx(config.head_dim**0.5 / 448)
    assert float(v_scale) == pytest.approx(float(calibration.layer(2).v_amax.max()) / 448)
    roomy = ActivationScales(config, calibration.layer, headroom=2.0)
    assert roomy.input_scale(0, "self_attn.o_proj") == 2 * scales.input_scale(0, "self_attn.o_proj")
    assert roomy.cache_scales(2) == (k_scale, 2 * v_scale)  # k cannot exceed its bound


def test_without_key_norms_the_cache_scale_is_calibrated(tmp_path: Path, documents: list[list[int]]) -> None:
    directory = write_checkpoint(tmp_path / "src", tiny_config(**VARIANTS["no_qk_norm"]))
    calibration = calibrated(directory, tmp_path / "out", pack(documents, 1000, 320))
    k_scale, _ = ActivationScales(Source(directory).config, calibration.layer).cache_scales(0)
    assert float(k_scale) == pytest.approx(float(calibration.layer(0).k_amax) / 448)
    assert float(k_scale) > 1e-3


def test_activations_that_overflow_name_the_layer(tmp_path: Path, documents: list[list[int]]) -> None:
    directory = write_checkpoint(tmp_path / "src", tiny_config())

    def huge(tensors: dict[str, Tensor]) -> None:
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.2.mlp.shared_mlp.{part}_proj.weight"] *= 1e30

    rewrite(directory, huge)
    with pytest.raises(UserError, match="layer 2 makes NaN or infinite activations"):
        calibrated(directory, tmp_path / "out", pack(documents, 100, 320))
