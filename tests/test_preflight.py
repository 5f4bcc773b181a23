"""What is refused, said or set in the user's own process, before any of the engine's exists."""

import json
import runpy
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from logged import messages_of
from vllm.config import ModelConfig, ParallelConfig
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from hunyuan_vllm import preflight
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.quantization_config import stored_format
from hunyuan_vllm.util.errors import UserError

spawning = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM spawns its processes on CPUs only")

CALL = "from hunyuan_vllm.preflight import check_main_guard\n"
BARE = CALL + "x = 1\ncheck_main_guard()\n"
IN_A_FUNCTION = CALL + "def main():\n    check_main_guard()\nmain()\n"
GUARDED = CALL + "if __name__ == '__main__':\n    check_main_guard()\n"


def run(tmp_path: Path, source: str) -> None:
    script = tmp_path / "ask.py"
    script.write_text(source)
    runpy.run_path(str(script), run_name="__main__")


@spawning
@pytest.mark.parametrize(("source", "line"), [(BARE, 3), (IN_A_FUNCTION, 4)])
def test_a_script_that_would_start_itself_again_is_refused(
    source: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match=rf'^ask.py .* `if __name__ == "__main__":` before line {line}'):
        run(tmp_path, source)


@spawning
@pytest.mark.parametrize(("source", "multiprocessing"), [(GUARDED, "1"), (BARE, "0")])
def test_other_scripts_pass(source: str, multiprocessing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    run(tmp_path, source)


def sampling(directory: Path, stored: dict[str, Any], **options: Any) -> dict[str, Any]:
    """vLLM's defaults for requests to a checkpoint with `stored` in generation_config.json."""
    load_general_plugins()
    shutil.copy(Path(__file__).parent / "golden" / "cla2_top1" / "config.json", directory)
    (directory / "generation_config.json").write_text(json.dumps(stored))
    return ModelConfig(model=str(directory), dtype="float32", **options).get_diff_sampling_param()


@pytest.mark.parametrize(
    ("stored", "options", "temperature"),
    [
        ({"do_sample": False}, {}, 0),
        ({"do_sample": False, "temperature": 0.7}, {}, 0),
        ({"do_sample": True, "temperature": 0.7}, {}, 0.7),
        ({"temperature": 0.7}, {}, 0.7),
        ({"do_sample": False}, {"override_generation_config": {"temperature": 0.5}}, 0.5),
        ({"do_sample": False, "temperature": 0.7}, {"override_generation_config": {"do_sample": True}}, 0.7),
        ({"temperature": 0.7}, {"override_generation_config": {"do_sample": False}}, 0),
        ({"do_sample": False}, {"generation_config": "vllm"}, None),
    ],
)
def test_a_checkpoint_that_does_not_sample_is_greedy(
    tmp_path: Path, stored: dict[str, Any], options: dict[str, Any], temperature: float | None
) -> None:
    assert sampling(tmp_path, stored, **options).get("temperature") == temperature


def test_other_overrides_stay_beside_greedy(tmp_path: Path) -> None:
    given = {"max_new_tokens": 99}
    found = sampling(tmp_path, {"do_sample": False, "top_k": 20}, override_generation_config=given)
    assert found == {"temperature": 0, "top_k": 20, "max_tokens": 99} and given == {"max_new_tokens": 99}


def test_a_default_length_of_answers_is_said_once(tmp_path: Path) -> None:
    def said(**options: Any) -> list[str]:
        preflight._warn_of_max_new_tokens.cache_clear()
        with messages_of(preflight.logger) as lines:
            for _ in range(2):
                found = sampling(tmp_path, {"max_new_tokens": 8}, **options)
        assert ("max_tokens" in found) == bool(lines)
        return lines

    (line,) = said()
    assert "answers end after 8 tokens" in line
    remedy = line.split("--override-generation-config '")[1].split("'")[0]
    assert said(override_generation_config=json.loads(remedy)) == said(generation_config="vllm") == []


def test_a_draft_with_other_kv_heads(tmp_path: Path) -> None:
    """Beside the caches that a CLA group shares; without sharing any draft goes."""
    load_general_plugins()
    golden = Path(__file__).parent / "golden"
    cla, v1 = (Network.read(json.loads((golden / name / "config.json").read_text())) for name in ("cla2_top1", "v1_7b"))
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"], "vocab_size": cla.vocab_size}
    for heads, fits in ((cla.num_key_value_heads, True), (2 * cla.num_key_value_heads, False)):
        sizes = {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": cla.head_dim}
        (tmp_path / "config.json").write_text(json.dumps(fields | sizes))
        draft = ModelConfig(model=str(tmp_path), dtype="float32", skip_tokenizer_init=True)
        preflight.check_draft(v1, draft)
        with nullcontext() if fits else pytest.raises(ValueError, match=f"draft has {heads} KV heads"):
            preflight.check_draft(cla, draft)


def test_ranks_that_share_an_expert() -> None:
    """Those of all replicas do, unless each holds whole experts, and a group of 4-bit weights is not divided."""
    config = Network.read(json.loads((Path(__file__).parent / "golden" / "v1_a13b" / "config.json").read_text()))
    (width,) = {config.intermediate_at(layer) for layer in range(config.num_hidden_layers)}
    parallel = ParallelConfig(tensor_parallel_size=2, data_parallel_size=2)
    assert preflight.expert_ranks(parallel) == 4
    assert preflight.expert_ranks(replace(parallel, enable_expert_parallel=True)) == 1
    preflight.check_expert_ranks(config, width // 2)
    with pytest.raises(ValueError, match=rf"^{2 * width} ranks, .* \(\[{width}\]\) .*: use enable_expert_parallel"):
        preflight.check_expert_ranks(config, 2 * width)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": width // 2, "desc_act": False, "sym": True}
    form = stored_format(gptq)
    form.check_ranks(config, 2)
    form.check_ranks(config, 2, 1)
    with pytest.raises(ValueError, match="with 4 ranks each has .* of (up|down)_proj"):
        form.check_ranks(config, 2, 4)
