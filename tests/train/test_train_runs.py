"""Whole runs: two processes and ZeRO against plain training, a run that is killed, a disk that fills up."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from forked_runs import STEPS, Run, begin, flags, log_of, make_base, train
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hunyuan_vllm import demo
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.train import trainer
from hunyuan_vllm.train.checkpoints import STAGING, checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "train" / "data" / "held_out.jsonl"
ZERO = {
    "ZeRO-2": ["--deepspeed", str(ROOT / "train" / "ds_zero2_no_offload.json")],
    "ZeRO-3": ["--deepspeed", str(ROOT / "train" / "ds_zero3_offload.json")],
    "ZeRO-3, experts as leaves": [
        "--deepspeed", str(ROOT / "train" / "ds_zero3_no_offload.json"), "--make_moe_param_leaf_module",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of twenty steps in one process."""
    output = tmp_path_factory.mktemp("plain") / "out"
    run = train(flags(base, output), output.with_name("log"))
    assert run.statuses == [0], run.said
    return output


def halt_after_a_checkpoint() -> None:
    """Have this process stop, as by a signal, when its first checkpoint is whole."""
    move_into_place = trainer.move_into_place

    def name_and_halt(staged: Path, final: Path) -> None:
        move_into_place(staged, final)
        trainer.move_into_place = move_into_place
        os.kill(os.getpid(), signal.SIGSTOP)

    trainer.move_into_place = name_and_halt


def wait_for_halt(pid: int) -> None:
    status = os.waitpid(pid, os.WUNTRACED)[1]
    assert os.WIFSTOPPED(status), status


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


def assert_same(output: Path, plain: Path) -> None:
    """The same losses over all steps, and the same weights at their end."""
    torch.testing.assert_close(torch.tensor(log_of(output)), torch.tensor(log_of(plain)), rtol=2e-5, atol=0)
    ours, expected = weights(output), weights(plain)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


class TestTwoProcesses:
    @pytest.mark.parametrize("mode", ["DDP", "ZeRO-2", "ZeRO-3, experts as leaves"])  # ZeRO-3 without: see TestKilled
    def test_they_equal_one_with_the_same_global_batch(
        self, mode: str, base: Path, plain: Path, tmp_path: Path
    ) -> None:
        run = train(flags(base, tmp_path / "out", *ZERO.get(mode, []), rows=4), tmp_path / "log", ranks=2)
        assert run.statuses == [0, 0], run.said
        assert_same(tmp_path / "out", plain)

    def test_parts_of_a_step_equal_the_whole(self, base: Path, plain: Path, tmp_path: Path) -> None:
        more = ("--gradient_accumulation_steps", "4", "--gradient_checkpointing")
        run = train(flags(base, tmp_path / "out", *more, rows=2), tmp_path / "log")
        assert run.statuses == [0], run.said
        assert f"serve it: MODEL_PATH={tmp_path}/out/final " in run.said
        assert_same(tmp_path / "out", plain)


def test_a_full_run_learns_and_serves(base: Path, plain: Path) -> None:
    losses = log_of(plain)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    files = {file.name for file in (plain / "final").iterdir()}
    assert files == {
        "config.json", "model.safetensors", "generation_config.json", "hy.tiktoken", "tokenizer_config.json",
    }  # fmt: skip
    model = HunYuanForCausalLM.from_pretrained(plain / "final")
    assert model.dtype == torch.float32
    board = EventAccumulator(str(plain / "runs"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second"} <= tags
    assert 0.25 <= board.Scalars("train/expert_load_max")[-1].value <= 1
    rates = log_of(plain, key="learning_rate")
    assert rates[0] == pytest.approx(1e-3, rel=0.02) and rates[-1] == pytest.approx(1e-4, rel=0.1)


class TestKilled:
    def test_it_goes_on_as_if_nothing_had_been(self, base: Path, plain: Path, tmp_path: Path) -> None:
        output, log = tmp_path / "out", tmp_path / "log"
        (pid,) = begin(flags(base, output), log, first=halt_after_a_checkpoint)
        wait_for_halt(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # As if it had been killed within the next checkpoint: a part of one, as the writing leaves it.
        part = output / STAGING / "checkpoint-20"
        part.mkdir(parents=True, exist_ok=True)
        (part / "trainer_state.json").write_text("{")
        assert [directory.name for directory in checkpoints(output)] == ["checkpoint-10"]
        run = train(flags(base, output, "--resume_from_checkpoint", "last"), log)
        assert run.statuses == [0], run.said
        assert "resuming from" in run.said
        assert log_of(output) == log_of(plain)
        for name, tensor in weights(output).items():
            assert torch.equal(tensor, weights(plain)[name]), name

    def test_under_zero_3_too(self, base: Path, plain: Path, tmp_path: Path) -> None:
        output, log = tmp_path / "out", tmp_path / "log"
        command = flags(base, output, *ZERO["ZeRO-3"], rows=4)
        pids = begin(command, log, ranks=2, first=halt_after_a_checkpoint)
        wait_for_halt(pids[0])  # the other waits for it
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        run = train([*command, "--resume_from_checkpoint", str(output / "checkpoint-10")], log, ranks=2)
        assert run.statuses == [0, 0], run.said
        assert_same(output, plain)


class TestFullDisk:
    def test_nothing_that_was_saved_is_lost(self, base: Path, plain: Path, tmp_path: Path) -> None:
        """By a limit on a file's size, which needs no root: the first checkpoint is written before it is set."""
        import resource

        output, log = tmp_path / "out", tmp_path / "log"
        (pid,) = begin(flags(base, output, "--save_total_limit", "1"), log, first=halt_after_a_checkpoint)
        wait_for_halt(pid)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        os.kill(pid, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = log.read_text()
        assert status == 3, said
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert "the checkpoint of step 20 could not be written" in last and "checkpoint-10 is complete" in last
        assert [directory.name for directory in checkpoints(output)] == ["checkpoint-10"]
        run = train(flags(base, output, "--save_total_limit", "1", "--resume_from_checkpoint", "last"), log)
        assert run.statuses == [0], run.said
        assert [directory.name for directory in checkpoints(output)] == ["checkpoint-20"]
        assert log_of(output) == log_of(plain)

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
    def test_a_disk_without_space(self, base: Path, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        room = sum(file.stat().st_size for file in base.iterdir()) * 6  # one checkpoint, with Adam's two moments

        def mount() -> None:
            assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", small], check=True)

        run = train(flags(base, small / "out"), tmp_path / "log", first=mount)
        assert run.statuses == [3], run.said
        assert "Traceback" not in run.said
        assert "checkpoint-10 is complete: free space and continue with --resume_from_checkpoint last" in run.said


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    output = tmp_path_factory.mktemp("lora") / "out"
    more = ("--use_lora", "--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0.1", "--aux_loss_coef",
            "0.01", "--packing", "--max_seq_length", "128", "--eval_data_file", str(HELD_OUT))  # fmt: skip
    return output, train(
        flags(base, output, *more, rows=2), output.with_name("log"), first=let_evaluations_last_an_hour
    )


def let_evaluations_last_an_hour() -> None:
    """By the trainer's clock."""
    evaluate, passed = transformers.Trainer.evaluate, 0.0

    def slow(self: transformers.Trainer, *arguments: Any, **named: Any) -> Any:
        nonlocal passed
        found = evaluate(self, *arguments, **named)
        passed += 3600
        return found

    transformers.Trainer.evaluate = slow
    trainer.time = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)


class TestLora:
    def test_the_adapter_is_in_pefts_layout(self, adapted: tuple[Path, Run], base: Path) -> None:
        output, run = adapted
        assert run.statuses == [0], run.said
        for directory in (output / "final", output / "checkpoint-20"):
            tensors = load_file(directory / "adapter_model.safetensors")
            places = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in tensors}
            both = {f"{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qo"}
            assert places == both | {f"0.self_attn.{part}_proj" for part in "kv"}
            settings = json.loads((directory / "adapter_config.json").read_text())
            assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4
        assert len(log_of(output, key="balance_loss")) == STEPS
        assert f"MODEL_PATH={base} " in run.said
        assert f" --enable-lora --lora-modules mine={output}/final\n" in run.said
        assert "packed into" in run.said and run.said.count("held-out loss") == 2
        assert min(log_of(output, key="tokens_per_second")) > 10

    def test_under_zero_3(self, base: Path, tmp_path: Path) -> None:
        more = (*ZERO["ZeRO-3"], "--bf16", "--use_lora", "--lora_rank", "4", "--max_steps", "4", "--save_steps", "4")
        run = train(flags(base, tmp_path / "out", *more, rows=2), tmp_path / "log", ranks=2)
        assert run.statuses == [0, 0], run.said
        tensors = load_file(tmp_path / "out" / "final" / "adapter_model.safetensors")
        assert len(tensors) == 2 * (2 * 2 + 2)  # q and o of two layers, k and v of one; A and B of each
        for name, tensor in tensors.items():
            assert 4 in tensor.shape and tensor.any(), name  # B began as nothing but zeros

    def test_it_is_resumed_with_the_settings_it_had(self, adapted: tuple[Path, Run], tmp_path: Path) -> None:
        output, _ = adapted
        command = [word for word in flags(Path("x"), tmp_path / "out", rows=2)][2:]
        more = ("--resume_from_checkpoint", str(output / "checkpoint-10"), "--packing", "--max_seq_length", "128",
                "--aux_loss_coef", "0.01")  # fmt: skip
        run = train([*command, *more], tmp_path / "log")
        assert run.statuses == [0], run.said
        assert log_of(tmp_path / "out") == log_of(output)
        run = train([*command, *more, "--use_lora", "--lora_rank", "8"], tmp_path / "log2")
        assert run.statuses == [2] and "was trained with 4, which cannot change" in run.said


class TestRoutersUnderDeepSpeed:
    """In bfloat16, which is DeepSpeed's business, and float32, which is the routers'."""

    def test_they_stay_in_float32(self, base: Path, tmp_path: Path) -> None:
        output, log = tmp_path / "out", tmp_path / "log"
        before = load_file(base / "model.safetensors")
        more = (*ZERO["ZeRO-3"], "--bf16", "--max_steps", "8", "--save_steps", "4")
        run = train(flags(base, output, *more, rows=4), log, ranks=2)
        assert run.statuses == [0, 0], run.said
        after = weights(output)
        assert after.keys() == before.keys()
        for name in (name for name in after if name.endswith("gate.wg.weight")):
            assert after[name].dtype == torch.float32
            assert not torch.equal(after[name], before[name])
            assert not torch.equal(after[name], after[name].bfloat16().float()), f"{name} was rounded"
        again = [*flags(base, tmp_path / "again", *more, rows=4)[2:]]
        resumed = train([*again, "--resume_from_checkpoint", str(output / "checkpoint-4")], log, ranks=2)
        assert resumed.statuses == [0, 0], resumed.said
        torch.testing.assert_close(
            torch.tensor(log_of(tmp_path / "again", 8)), torch.tensor(log_of(output, 8)), rtol=1e-3, atol=0
        )
        for name, tensor in weights(tmp_path / "again").items():
            torch.testing.assert_close(tensor, after[name], rtol=0.02, atol=1e-3)

    def test_those_that_are_not_trained_are_as_they_were(self, base: Path, tmp_path: Path) -> None:
        more = (*ZERO["ZeRO-2"], "--bf16", "--train_attention_params_only", "--max_steps", "4")
        run = train(flags(base, tmp_path / "out", *more, rows=4), tmp_path / "log", ranks=2)
        assert run.statuses == [0, 0], run.said
        before, after = load_file(base / "model.safetensors"), weights(tmp_path / "out")
        for name, tensor in after.items():
            if name.endswith("gate.wg.weight"):
                assert torch.equal(tensor, before[name])
            assert torch.equal(tensor, before[name].bfloat16().float()) is not (".self_attn." in name) or "wg" in name


class TestNewNetworks:
    SHAPE = (
        "--tokenizer_name_or_path", str(Path(demo.__file__).parent), "--num_layers", "4", "--hidden_size", "32",
        "--intermediate_size", "24", "--num_attention_heads", "4", "--num_key_value_heads", "2", "--num_experts", "2",
        "--moe_topk", "1", "--use_cla", "--use_mixed_mlp_moe", "--use_qk_norm", "--max_position_embeddings", "64",
        "--use_dummy_data", "--max_steps", "3", "--save_steps", "3",
    )  # fmt: skip

    @pytest.mark.parametrize("more", [(), (*ZERO["ZeRO-3"], "--bf16")], ids=["plain", "ZeRO-3"])
    def test_one_is_made_by_its_shape_and_serves(self, more: tuple[str, ...], tmp_path: Path) -> None:
        command = flags(tmp_path, tmp_path / "out", rows=2)[4:]
        run = train([*command, *self.SHAPE, *more], tmp_path / "log", ranks=2 if more else 1)
        assert set(run.statuses) == {0}, run.said
        model = HunYuanForCausalLM.from_pretrained(tmp_path / "out" / "final")
        assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 4 and model.config.use_cla
        assert model.config.vocab_size == 2048 and model.config.eos_token_id == 1803
        assert 0.01 < model.model.layers[1].mlp.gate.wg.weight.std() < 0.04
        assert "max_position_embeddings" in json.loads((tmp_path / "out" / "final" / "config.json").read_text())
