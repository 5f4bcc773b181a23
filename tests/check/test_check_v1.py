"""Hunyuan V1 checkpoints as published: every spelling of the config, and a tokenizer.json without hy.tiktoken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import check_directory, findings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hunyuan_vllm.util.findings import Status

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("begin▁of▁sentence", "User", "Assistant", "place▁holder▁no▁2", "place▁holder▁no▁3", "place▁holder▁no▁8")
BEGIN, USER, ASSISTANT, END, SYSTEM_END, OTHER_END = (f"<｜hy_{name}｜>" for name in NAMES)
TEMPLATE = (
    f"{BEGIN}{{% for message in messages %}}{{% if message.role == 'system' %}}{{{{ message.content }}}}{SYSTEM_END}"
    f"{{% elif message.role == 'user' %}}{USER}{{{{ message.content }}}}{ASSISTANT}"
    f"{{% else %}}{{{{ message.content }}}}{END}{{% endif %}}{{% endfor %}}"
)


def checkpoint(directory: Path, name: str) -> Path:
    """A copy of a golden checkpoint with a byte-level vocabulary, as the dense models have."""
    shutil.copytree(GOLDEN / name, directory, dirs_exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<｜hy_{name}｜>", special=True) for name in NAMES])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    write(directory / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    write(directory / "generation_config.json", {"eos_token_id": [259, 261], "top_p": 0.8, "do_sample": True})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["v1_a13b", "v1_moe_tf", "v1_7b", "v1_1_8b", "v1_7b_0124"])
def test_published_spellings_are_sound(tmp_path: Path, name: str) -> None:
    report = check_directory(checkpoint(tmp_path, name))
    assert not findings(report) and not findings(report, Status.WARNING), report.sections
    (template,) = (found for found in findings(report, Status.OK) if found.subject == "template")
    assert template.text.startswith("the checkpoint's;") and BEGIN in template.text


def test_a_v1_checkpoint_with_faults(tmp_path: Path) -> None:
    checkpoint(tmp_path, "v1_7b")
    write(tmp_path / "generation_config.json", {"eos_token_id": [258, 261]})
    found = {problem.subject: problem for problem in findings(check_directory(tmp_path))}
    assert f"answers end with {END} (id 259)" in found["template"].text
    write(tmp_path / "generation_config.json", {"eos_token_id": [259], "temperature": -1})
    (problem,) = findings(check_directory(tmp_path))
    assert problem.subject == "temperature" and "top_p 0.8" in problem.remedy
    fields = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", fields | {"model_type": "hunyuan_vl"})
    assert "hunyuan_v1_dense" in next(p.text for p in findings(check_directory(tmp_path)) if p.subject == "config.json")


def test_the_scales_of_an_fp8_cache_lie_beside_the_shards(tmp_path: Path) -> None:
    checkpoint(tmp_path, "v1_7b")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "model-00001-of-00001.safetensors", "np") as tensors:
        weight_map = dict.fromkeys(tensors.keys(), "model-00001-of-00001.safetensors")
    write(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    shutil.copy(tmp_path / "model-00001-of-00001.safetensors", tmp_path / "kv_cache_scales.safetensors")
    assert not findings(check_directory(tmp_path), Status.WARNING)
