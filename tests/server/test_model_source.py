"""MODEL_PATH: what is wrong with it is said before anything starts."""

import json
import shutil

import pytest
from checkpoints import rewrite, tiny_config, write_checkpoint
from golden_data import GOLDEN

from hunyuan_vllm.server.models import check_files, open_model
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError


def test_a_checkpoint_is_opened_with_its_size():
    directory = GOLDEN / "cla2_top1"
    model = open_model(str(directory))
    assert model.local
    assert model.config.num_key_value_heads == 2
    assert model.chat_template is None
    assert model.weight_bytes == sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def test_its_chat_template_is_read(tmp_path):
    directory = shutil.copytree(GOLDEN / "cla2_top1", tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert open_model(str(directory)).chat_template == "{{ messages }}"


def test_a_directory_without_a_tokenizer_is_noticed_before_a_start(tmp_path):
    directory = shutil.copytree(GOLDEN / "cla2_top1", tmp_path / "model")
    (directory / "hy.tiktoken").touch()
    check_files(open_model(str(directory)), Flags(), {})
    (directory / "hy.tiktoken").unlink()
    model = open_model(str(directory))
    with pytest.raises(UserError, match="has no tokenizer: copy hy.tiktoken"):
        check_files(model, Flags(), {})
    check_files(model, Flags(["--tokenizer", "/elsewhere"]), {})
    check_files(model, Flags(["--skip-tokenizer-init"]), {})


def test_a_hub_name_is_taken_as_it_is():
    model = open_model("tencent/Hunyuan-A52B-Instruct")
    assert (model.name, model.local) == ("tencent/Hunyuan-A52B-Instruct", False)


def test_the_demo_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_model("demo").demo
    (tmp_path / "demo").mkdir()  # a directory of that name is the directory
    with pytest.raises(UserError, match="has no config.json"):
        open_model("demo")


@pytest.mark.parametrize("given", ["/no/such/directory", "./nothing", "../x", "a/b/c", "name"])
def test_a_directory_that_is_not_there(given):
    with pytest.raises(UserError, match="does not exist"):
        open_model(given)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "[1]"}, "model_type None"),
        ({"config.json": '{"model_type": "llama"}'}, "model_type 'llama'; Hunyuan checkpoints have one of hunyuan, "),
        ({"config.json": '{"model_type": "hunyuan", "num_key_value_heads": 3}'}, "num_key_value_heads is 3"),
        (
            {
                "config.json": '{"model_type": "hunyuan"}',
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-2.safetensors"}}),
            },
            "model-2.safetensors",
        ),
    ],
)
def test_a_directory_that_is_no_checkpoint(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        open_model(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="name the directory"):
        open_model(str(tmp_path / "model.safetensors"))


def test_a_missing_tensor_is_named_before_a_server_is_started(tmp_path):
    directory = write_checkpoint(tmp_path / "model", tiny_config())
    rewrite(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match="lacks checkpoint tensor 'model.norm.weight'"):
        open_model(str(directory))
