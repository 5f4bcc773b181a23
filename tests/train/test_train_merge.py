"""Merging an adapter: the weights that come out, in every spelling and type; kills; and what is refused, by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ALPHA, RANK, adapter_pairs, write_adapter
from checkpoints import rewrite, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from hunyuan_vllm import demo
from hunyuan_vllm.adapter import ADAPTER_FILE
from hunyuan_vllm.cli import app
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.writer import ShardWriter
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = tiny_config(num_hidden_layers=2)
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("base") / "bf16", CONFIG, shard_bytes=300_000)
    (directory / "generation_config.json").write_text('{"top_k": 20}')
    (directory / "hy.tiktoken").write_bytes(b"IQ== 0\n")
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora", adapter_pairs(CONFIG))


def stored(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merge(base: Path, adapter: Path, target: Path, dtype: str = "bf16", shard_bytes: int = 5 * 10**9) -> Path:
    source = Source(base)
    Merge(source, Adapter(adapter, source.config), target, SAVE_DTYPES[dtype], shard_bytes).run()
    return target


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


@pytest.mark.parametrize("dtype", SAVE_DTYPES)
def test_weights(base: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    before, after = stored(base), stored(merge(base, adapter, tmp_path / "out", dtype))
    pairs = adapter_pairs(CONFIG)
    assert after.keys() == before.keys() and len(pairs) == 6  # q, k, v, o of the owner; q, o of the cross layer
    for name, tensor in before.items():
        wanted = torch.float32 if name.endswith("gate.wg.weight") else SAVE_DTYPES[dtype]
        if name in pairs:
            a, b = pairs[name]
            exact = tensor.double() + b.double() @ a.double() * ALPHA / RANK
            assert after[name].dtype == wanted
            # Half a unit in the last place of the type, and float32's error in the sum.
            bound = torch.finfo(wanted).eps / 2 * exact.abs() + 1e-5
            assert bool(((after[name].double() - exact).abs() <= bound).all()), name
            assert not torch.equal(after[name], tensor.to(wanted))
        else:
            assert after[name].dtype == wanted and torch.equal(after[name], tensor.to(wanted)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("torch_dtype") == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    assert config == {k: v for k, v in json.loads((base / "config.json").read_text()).items() if k != "torch_dtype"}
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"top_k": 20}'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]  # no .partial is left


def test_it_equals_peft(base: Path, tmp_path: Path) -> None:
    """With rsLoRA, and ranks and alphas of their own for some modules, experts among them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from hunyuan_vllm.reference import HunYuanForCausalLM

    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, r".*experts\.\d+\.down_proj": 3},
        alpha_pattern={"v_proj": 5},
        init_lora_weights=False,
    )
    model = HunYuanForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(tmp_path / "lora")
    wanted = tuned.merge_and_unload().state_dict()
    found = stored(merge(base, tmp_path / "lora", tmp_path / "out", "fp32"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6, msg=name)
    changed = [name for name, tensor in stored(base).items() if not torch.equal(tensor.float(), found[name])]
    assert len(changed) == 2 + 1 + 2 * 5  # q_proj twice, v_proj once, four experts and the shared MLP a layer


def test_every_spelling_gives_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    fused = write_checkpoint(tmp_path / "fused", CONFIG, fused=True, stray=True)
    for source in (base, fused):
        merge(source, adapter, tmp_path / f"{source.name}-out")
    files = [tmp_path / name / "model.safetensors" for name in ("bf16-out", "fused-out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shards_hold_the_same_tensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    one = stored(merge(base, adapter, tmp_path / "one"))
    several = stored(merge(base, adapter, tmp_path / "several", shard_bytes=200_000))
    assert len(list((tmp_path / "several").glob("model-*-of-*.safetensors"))) > 3
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)


def in_a_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_kill_9_at_any_moment(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Before every rename, and within files: the next run ends with the same bytes."""
    wanted = digests(merge(base, adapter, tmp_path / "whole", shard_bytes=300_000))

    def killed(target: Path, moment: int) -> None:
        torch.set_num_threads(1)
        left = iter(range(moment, -1, -1))

        def then_die(real: Callable[..., object]) -> Callable[..., object]:
            def call(*given: Any) -> object:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*given)

            return call

        os.replace = then_die(os.replace)
        ShardWriter.write = then_die(ShardWriter.write)
        merge(base, adapter, target, shard_bytes=300_000)

    ends = []
    for moment in (0, 1, *range(2, 50, 6), *range(50, 100)):
        target = tmp_path / str(moment)
        ends.append(in_a_child(lambda target=target, moment=moment: killed(target, moment)))
        if ends[-1] == 0:
            break
        assert not target.exists()
        merge(base, adapter, target, shard_bytes=300_000)
        assert digests(target) == wanted
        shutil.rmtree(target)
    assert (
        ends[-1] == 0 and set(ends[:-1]) == {-signal.SIGKILL} and len(ends) > 12
    )  # the last of them before the last rename


def test_other_inputs_do_not_go_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    def killed() -> None:
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL) if "model" in str(names) else os.rename(*names)
        merge(base, adapter, tmp_path / "out")

    assert in_a_child(killed) == -signal.SIGKILL
    with pytest.raises(UserError, match="was started with --save_dtype bfloat16, this run has float32"):
        merge(base, adapter, tmp_path / "out", "fp32")
    changed = shutil.copytree(adapter, tmp_path / "lora")
    rewrite_adapter(changed, lambda tensors: tensors.update({name: tensor * 2 for name, tensor in tensors.items()}))
    with pytest.raises(UserError, match="was started with an --adapter_model_path of contents"):
        merge(base, changed, tmp_path / "out")


def test_a_flipped_bit_is_found(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ShardWriter.__exit__

    def damage(self: Any, *given: Any) -> None:
        ends(self, *given)
        (file,) = (tmp_path / "out.partial" / "checkpoint").glob(".model*")
        content = bytearray(file.read_bytes())
        content[-1000] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(ShardWriter, "__exit__", damage)
    with pytest.raises(UserError, match=r"model\..* reads back differently: the disk or the memory is at fault"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite_adapter(directory: Path, change: Change) -> None:
    tensors = load_file(directory / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, directory / ADAPTER_FILE)


@pytest.fixture
def changed(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """The adapter with other tensors, or other settings."""

    def make(change: Change | None = None, **settings: Any) -> Path:
        directory = shutil.copytree(adapter, tmp_path / "lora")
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        if change:
            rewrite_adapter(directory, change)
        return directory

    return make


PREFIX = "base_model.model.model.layers."


def put(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({f"{name}": torch.zeros(shape)})


def both(module: str, outputs: int, inputs: int) -> Change:
    a, b = f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"
    return lambda tensors: tensors.update({a: torch.zeros(RANK, inputs), b: torch.zeros(outputs, RANK)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (both("model.layers.1.self_attn.k_proj", 64, 128),
         "model.layers.1.self_attn.k_proj: layer 1 shares the K and V of layer 0, and has no k_proj"),
        (both("model.layers.7.self_attn.q_proj", 128, 128),
         "model.layers.7.self_attn.q_proj: this network has 2 layers: it was trained on another model"),
        (both("model.layers.0.self_attn.q_proj", 256, 192),
         r"has A \[4, 192\] and B \[256, 4\], which do not fit rank 4 .* weight \[128, 128\]: .* on another model"),
        (both("model.layers.0.mlp.experts.9.up_proj", 96, 128), "this network has no such linear layer"),
        (both("model.embed_tokens", 320, 128), "an adapter of the embedding is not merged"),
        (put(f"{PREFIX}0.self_attn.q_proj.lora_A.weight", 3, 128), r"has A \[3, 128\] and B .* do not fit rank 4"),
        (lambda tensors: tensors.pop(f"{PREFIX}0.self_attn.q_proj.lora_B.weight"),
         "model.layers.0.self_attn.q_proj has an A and no B"),
        (put(f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector", 128), "lora_magnitude_vector' is not A or B"),
        (lambda tensors: tensors.clear(), "holds no LoRA matrix"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    base: Path, changed: Callable[..., Path], tmp_path: Path, change: Change, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        merge(base, changed(change), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(r=8), "which do not fit rank 8 of adapter_config.json"),
        (dict(use_dora=True), "use_dora is True: only plain LoRA"),
        (dict(peft_type="IA3"), "peft_type is 'IA3', and only LORA"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]: only plain LoRA"),
        (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights is 'pissa_niter_16', which changed"),
        (dict(r=0), "r: Input should be greater than 0"),
        (dict(lora_alpha=None), "lora_alpha: Input should be a valid number"),
    ],
)
def test_settings_that_are_refused(
    base: Path, changed: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        merge(base, changed(**settings), tmp_path / "out")


def test_files_that_are_no_adapter(base: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not a directory"):
        merge(base, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match=r"has no adapter_config.json: name the directory that training saved"):
        merge(base, base, tmp_path / "out")
    directory = changed()
    (directory / ADAPTER_FILE).write_bytes((directory / ADAPTER_FILE).read_bytes()[:-10])
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        merge(base, directory, tmp_path / "out")
    (directory / ADAPTER_FILE).rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only adapter_model.bin: save it as safetensors"):
        merge(base, directory, tmp_path / "out")


def test_a_diverged_adapter(base: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    name = f"{PREFIX}1.self_attn.o_proj.lora_B.weight"
    directory = changed(lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(UserError, match=f"'{name}' in .* holds NaN or infinite values: the training has diverged"):
        merge(base, directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_beyond_fp16(adapter: Path, tmp_path: Path) -> None:
    large = write_checkpoint(tmp_path / "base", CONFIG)
    rewrite(large, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(UserError, match="'model.norm.weight' has values beyond 65,504.*use --save_dtype bf16"):
        merge(large, adapter, tmp_path / "out", "fp16")


def test_a_quantised_base(adapter: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "base", CONFIG)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match=r"is already quantised \(fp8\): give the BF16 checkpoint"):
        merge(directory, adapter, tmp_path / "out")


def test_targets(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert digests(merge(base, adapter, tmp_path / "empty"))  # an empty directory is taken
    with pytest.raises(UserError, match="empty exists: name a directory that does not"):
        merge(base, adapter, tmp_path / "empty")
    with pytest.raises(UserError, match="is an input: name another directory"):
        merge(base, adapter, base)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 0.0 MB free, merging needs \d.\d MB more: make room"):
        merge(base, adapter, tmp_path / "out")


def test_the_script_with_the_published_flags(base: Path, adapter: Path, tmp_path: Path) -> None:
    script = [ROOT / "train" / "merge_lora_weight.sh", "--base_model_path", base, "--adapter_model_path", adapter]
    command = ["sh", *script, "--output_path", tmp_path / "out", "--save_dtype", "fp32"]
    environment = os.environ | {"HUNYUAN_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "6 of 49 tensors change" in done.stderr
    assert f"serve it: MODEL_PATH={tmp_path}/out " in done.stderr
    assert digests(tmp_path / "out") == digests(merge(base, adapter, tmp_path / "again", "fp32"))


def test_the_demo_model_by_its_name(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", adapter_pairs(HunYuanConfig.from_pretrained(demo.path())))
    flags = ["--base_model_path", "demo", "--adapter_model_path", str(adapter), "--output_path", str(tmp_path / "out")]
    assert CliRunner().invoke(app, ["merge-lora", *flags]).exit_code == 0
    assert (tmp_path / "out" / "hy.tiktoken").read_bytes() == (demo.path() / "hy.tiktoken").read_bytes()
