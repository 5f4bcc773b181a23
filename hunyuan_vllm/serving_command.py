"""The shell command that serves what a tool has written, from whichever directory it is typed in."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from hunyuan_vllm import demo
from hunyuan_vllm.adapter import ATTENTION, MAX_LORA_RANKS, max_lora_rank


def checkpoint_command(directory: Path, scheme: str | None = None) -> str:
    """Serve a checkpoint, quantised as `scheme` says if it is."""
    model = demo.NAME if directory.absolute() == demo.path() else shlex.quote(str(directory.absolute()))
    script = Path(__file__).absolute().parents[1] / "deploy" / "run_server.sh"
    # The scripts are not there where the package was installed from a wheel.
    server = f"sh {shlex.quote(str(script))}" if script.exists() else _command("serve")
    return f"MODEL_PATH={model} {server}" + (f" --scheme {scheme}" if scheme else "")


def adapter_command(adapter: Path, base: Path, rank: int, targets: Iterable[str], gpu: bool) -> str:
    """Serve a LoRA adapter on its model; merged into it, where a server here could not have it beside the model."""
    if rank <= MAX_LORA_RANKS[-1] and (gpu or set(targets) <= set(ATTENTION)):
        room = max_lora_rank(rank)
        flags = ["--enable-lora", *(["--max-lora-rank", str(room)] if room > MAX_LORA_RANKS[0] else [])]
        return (
            f"{checkpoint_command(base)} {' '.join(flags)} --lora-modules mine={shlex.quote(str(adapter.absolute()))}"
        )
    merged = adapter.absolute().with_name(f"{adapter.name}-merged")
    paths = {"base_model_path": base.absolute(), "adapter_model_path": adapter.absolute(), "output_path": merged}
    words = [f"--{name} {shlex.quote(str(path))}" for name, path in paths.items()]
    return f"{_command('merge-lora')} {' '.join(words)} && {checkpoint_command(merged)}"


def _command(name: str) -> str:
    """The command of this environment, which need not be on the PATH of the shell."""
    return f"{shlex.quote(str(Path(sys.executable).with_name('hunyuan-vllm')))} {name}"
