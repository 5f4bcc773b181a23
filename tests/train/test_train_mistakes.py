"""What a user may get wrong: one line that names it, status 2, and nothing begun; and flags that change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from hunyuan_vllm import demo
from hunyuan_vllm.train import distributed
from hunyuan_vllm.train import run as needed
from hunyuan_vllm.train.arguments import ignored, parse
from hunyuan_vllm.train.checkpoints import (
    STAGING,
    check_checkpoint,
    checkpoints,
    move_into_place,
    remove_old,
    resume_directory,
)
from hunyuan_vllm.train.distributed import read_deepspeed_config, without_offload
from hunyuan_vllm.train.run import main
from hunyuan_vllm.util.errors import UserError

ROOT = Path(__file__).parents[2]
DEMO = Path(demo.__file__).parent
DATA = ROOT / "train" / "data" / "train.jsonl"


@pytest.fixture
def mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The line that a run ends with."""

    def run(*words: str | Path) -> str:
        status = main([*("--output_dir", str(tmp_path / "out")), *map(str, words)])
        last = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and last.startswith("hunyuan-vllm: "), last
        assert not checkpoints(tmp_path / "out")
        return last

    return run


class TestMistakes:
    def test_flags(self, mistake) -> None:
        assert mistake("--nonsense", "1").endswith("unknown flag --nonsense (--help lists them)")
        assert "unknown flag --lora_ranks: did you mean --lora_rank?" in mistake("--lora_ranks", "1")
        assert "invalid int value: 'many'" in mistake("--max_steps", "many")
        assert "--min_lr 1.0 is more than --learning_rate" in mistake("--min_lr", "1", "--learning_rate", "1e-4")
        assert "--report_to wandb: use tensorboard or none" in mistake("--report_to", "wandb")
        assert "--max_seq_length 9999: the model's longest context is 2048 tokens" in mistake(
            "--max_seq_length", "9999"
        )

    def test_of_another_process_than_the_first(self, mistake, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[str] = []
        monkeypatch.setattr(distributed, "wait_for_first", lambda: waits.append("for the first"))
        monkeypatch.setenv("RANK", "1")
        assert "/nowhere is not a directory" in mistake("--model_name_or_path", "/nowhere")
        assert waits == ["for the first"]  # whose end, where it knows too, ends this one
        monkeypatch.setenv("RANK", "0")
        assert "/nowhere is not a directory" in mistake("--model_name_or_path", "/nowhere") and len(waits) == 1

    def test_checkpoints(self, mistake, tmp_path: Path) -> None:
        assert "/nowhere is not a directory: name a checkpoint" in mistake("--model_name_or_path", "/nowhere")
        assert "has no config.json" in mistake("--model_name_or_path", tmp_path)
        directory = write_checkpoint(tmp_path / "model", tiny_config())
        named = ("--model_name_or_path", directory, "--tokenizer_name_or_path", DEMO, "--train_data_file", DATA)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
        assert "is already quantised (fp8): give the BF16 checkpoint" in mistake(*named)
        (directory / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
        assert "config.json: HunYuanConfig: " in mistake(*named)
        (directory / "config.json").write_text(json.dumps(config))
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "model.safetensors is truncated" in mistake(*named)
        assert "the tokenizer of" in mistake("--tokenizer_name_or_path", tmp_path)
        assert "a new network needs --tokenizer_name_or_path" in mistake("--num_layers", "2")

    def test_data(self, mistake, tmp_path: Path) -> None:
        lines = DATA.read_text().splitlines()[:3]
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join([*lines, '{"messages": [{"role": "user", "content": "?"}]}', "{"]) + "\n")
        line = mistake("--train_data_file", data)
        assert "data.jsonl: line 4: it ends with the user's message" in line and "line 5: it is not JSON" in line
        assert "cannot be read" in mistake("--train_data_file", tmp_path / "none.jsonl")
        assert "give --train_data_file" in mistake("--model_name_or_path", DEMO)

    def test_modules_that_are_not_there(self, mistake) -> None:
        line = mistake("--lora_target_modules", "q_proj", "qkv_proj")
        assert "--lora_target_modules qkv_proj: this network has down_proj, gate_proj, k_proj" in line

    def test_a_directory_that_cannot_be_written_to(self, mistake, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        line = mistake("--output_dir", tmp_path / "file" / "out")
        assert "cannot be written to (Not a directory): name another directory" in line

    def test_libraries_that_are_missing(self, mistake, monkeypatch: pytest.MonkeyPatch) -> None:
        there = needed.find_spec
        monkeypatch.setattr(needed, "find_spec", lambda name: None if name in ("peft", "deepspeed") else there(name))
        assert (
            "fine-tuning needs peft: sh deploy/setup_env.sh --train, or pip install 'hunyuan-vllm[train]'" in mistake()
        )
        assert "fine-tuning needs peft, deepspeed" in mistake("--deepspeed", "x.json")

    def test_deepspeed(self, mistake, tmp_path: Path) -> None:
        assert "cannot be read" in mistake("--deepspeed", tmp_path / "none.json")
        file = tmp_path / "ds.json"
        whole = json.loads((ROOT / "train" / "ds_zero3_offload.json").read_text())
        zero = whole["zero_optimization"]
        broken = {
            "is not JSON": "{",
            'needs a "stage", 0 to 3': json.dumps({**whole, "zero_optimization": {"stage": 4}}),
            '"offload_param" is not an object': json.dumps(
                {**whole, "zero_optimization": {**zero, "offload_param": "cpu"}}
            ),
            'lacks "train_micro_batch_size_per_gpu"': json.dumps({"zero_optimization": {"stage": 2}}),
            '"stage3_gather_16bit_weights_on_model_save": true': json.dumps(
                {**whole, "zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": False}}
            ),
        }
        for words, text in broken.items():
            file.write_text(text)
            assert words in mistake("--deepspeed", file)

    def test_what_is_resumed(self, mistake, tmp_path: Path) -> None:
        assert "has no checkpoint-N" in mistake("--resume_from_checkpoint", "last")
        assert "is not a directory: name a" in mistake("--resume_from_checkpoint", tmp_path / "checkpoint-3")


def test_configs_are_what_deepspeed_and_the_documents_say() -> None:
    for file in sorted((ROOT / "train").glob("ds_*.json")):
        config = read_deepspeed_config(str(file))
        changed, lines = without_offload(config)
        offloads = "offload" in file.name and "no_offload" not in file.name
        assert bool(lines) is offloads and "offload_param" not in changed["zero_optimization"]
        assert ("auto" in json.dumps(config)) is ("no_auto" not in file.name)


def test_an_offload_of_null_is_none() -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": None}}
    assert without_offload(config) == (config, [])


def test_a_rate_of_zero_has_a_schedule_too() -> None:
    training = parse(["--learning_rate", "0", "--min_lr", "0"]).training
    assert training.lr_scheduler_type == "cosine_with_min_lr" and training.learning_rate == 0


class TestIgnored:
    def lines(self, *words: str) -> str:
        return "\n".join(ignored(parse(["--model_name_or_path", str(DEMO), "--train_data_file", str(DATA), *words])))

    def test_each_is_named_with_its_reason(self) -> None:
        assert self.lines("--learning_rate", "1e-4", "--bf16") == ""
        for words, expected in {
            (
                "--num_experts",
                "2",
                "--use_cla",
            ): "--num_experts, --use_cla changes nothing: the checkpoint",
            ("--lora_rank", "8"): "--lora_rank changes nothing: --use_lora is not given",
            ("--make_moe_param_leaf_module",): "it is for ZeRO-3",
            ("--do_train", "--overwrite_output_dir"): "this command only trains",
        }.items():
            assert expected in self.lines(*words), words

    def test_flash_attention_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert "--use_flash_attn changes nothing: there is no GPU" in self.lines("--use_flash_attn")

    def test_the_published_command_is_understood(self) -> None:
        words = """--do_train --overwrite_output_dir --per_device_train_batch_size 1
        --gradient_accumulation_steps 1 --gradient_checkpointing --lr_scheduler_type cosine_with_min_lr
        --logging_steps 1 --max_steps 200 --save_steps 100 --learning_rate 1e-5 --min_lr 1e-6 --warmup_ratio
        0.01 --save_strategy steps --save_safetensors False --use_lora --lora_rank 64 --lora_alpha 128
        --lora_dropout 0.1 --hidden_size 6400 --intermediate_size 18304 --model_max_length 4096
        --max_seq_length 4096 --moe_topk 1 --num_experts 2 --num_attention_heads 80 --num_key_value_heads 8
        --num_layers 4 --cla_share_factor 2 --use_cla --use_mixed_mlp_moe --num_shared_expert 1 --use_qk_norm
        --bf16""".split()
        arguments = parse(["--model_name_or_path", "x", "--train_data_file", "y", *words])
        assert arguments.training.warmup_steps == 0.01 and arguments.training.bf16 and not arguments.demo
        assert arguments.training.lr_scheduler_kwargs == {"min_lr_rate": pytest.approx(0.1)}

    def test_without_a_model_the_demo_model_is_trained(self) -> None:
        arguments = parse(["--lora_rank", "3"])
        assert arguments.demo and arguments.model.use_lora and arguments.model.lora_rank == 3
        assert arguments.model.model_name_or_path == str(DEMO) and arguments.data.train_data_file == str(DATA)


class TestWhole:
    def test_a_directory_replaces_what_had_its_name(self, tmp_path: Path) -> None:
        final, beside = tmp_path / "final", tmp_path / STAGING / "final"
        for text in ("one", "two"):
            (beside / "part").mkdir(parents=True)
            (beside / "part" / "file").write_text(text)
            move_into_place(beside, final)
            assert (final / "part" / "file").read_text() == text and not any((tmp_path / STAGING).iterdir())

    def test_old_ones_go_by_their_steps(self, tmp_path: Path) -> None:
        for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-x", "final"):
            (tmp_path / name).mkdir()
        assert [directory.name for directory in remove_old(tmp_path, 1)] == ["checkpoint-3", "checkpoint-20"]
        assert {directory.name for directory in tmp_path.iterdir()} == {
            "checkpoint-100",
            "checkpoint-x",
            "final",
            STAGING,
        }
        assert remove_old(tmp_path, None) == []

    def test_one_that_is_not_whole_is_not_gone_on_from(self, tmp_path: Path) -> None:
        directory = tmp_path / "checkpoint-5"
        for missing in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            for name in {"trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"} - {missing}:
                (directory / name).write_text("{}")
            with pytest.raises(UserError, match="is not a checkpoint to resume from: it has no"):
                check_checkpoint(directory)
        (directory / "rng_state.pth").touch()
        assert resume_directory("last", tmp_path) == resume_directory(str(directory), tmp_path) == directory
        with pytest.raises(UserError, match="is incomplete: resume from"):
            check_checkpoint(tmp_path / STAGING / "checkpoint-9")
