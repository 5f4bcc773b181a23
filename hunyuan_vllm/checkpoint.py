"""A checkpoint's files: found, checked from their headers before minutes are spent on reading, and read"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hunyuan_vllm.headers import StoredTensor, Used, header_faults, read_shards
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.util.text import some

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
PUBLISHED_AT = "tencent/Tencent-Hunyuan-Large on the Hugging Face hub, folder Hunyuan-A52B-Instruct"
# Reads pickled tensors without running what else the file holds, a file at a time.
UNPICKLE = (
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "[save_file({{name: tensor.clone() for name, tensor in torch.load(file, weights_only=True).items()}}, "
    "file[:-3] + 'safetensors') for file in glob.glob('{}/pytorch_model*.bin')]\""
)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a sharded checkpoint: "weight_map" (tensor → file name) and perhaps "metadata". None without one."""
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    try:
        content = json.loads(index.read_text())
        sorted(content["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}): download it again") from None
    return content


def missing_config(folder: Path) -> tuple[str, str]:
    """What is wrong with a folder that has no config.json, as the end of the sentence "FOLDER …"; and what to do."""
    if inner := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return f"is no checkpoint, and has some in its folders ({', '.join(inner)})", "name one of them"
    if (folder / "adapters.safetensors").exists():
        return "is an adapter of MLX, not a checkpoint", "merge it with mlx_lm.fuse, or train one with hunyuan-vllm"
    if (folder / "adapter_config.json").exists():
        return "is an adapter, not a checkpoint", "name its checkpoint, or merge both with hunyuan-vllm merge-lora"
    if gguf := _gguf(folder):
        return gguf
    return "has no config.json", f"copy it from the checkpoint that its weights are of; published: {PUBLISHED_AT}"


def missing_weights(folder: Path) -> tuple[str, str]:
    """The same of a folder that has no *.safetensors."""
    if any(folder.glob("pytorch_model*.bin")):
        return "has pickled weights (*.bin) and no *.safetensors", f"convert them with {UNPICKLE.format(folder)}"
    if gguf := _gguf(folder):
        return gguf
    return "has no *.safetensors", f"copy all files of the checkpoint there; published: {PUBLISHED_AT}"


def _gguf(folder: Path) -> tuple[str, str] | None:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return (f"has {_quoted(files)} of llama.cpp, which is not served", "take the safetensors files") if files else None


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are. Empty for other formats."""
    index = read_index(folder)
    if index is None:
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(index["weight_map"].values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {_quoted(absent)}, not in {folder}: download the missing files"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of a checkpoint, from its headers."""
    shards = read_shards(shard_files(folder))
    for shard in shards:
        if shard.fault:
            raise CheckpointError(f"{shard.file} {shard.fault}: download it again")
    return [tensor for shard in shards for tensor in shard.tensors]


def used_tensors(folder: Path, layout: Layout) -> Used:
    """The stored tensors that the network uses, each with the canonical ones that it holds; none without weights.

    Every tensor's name, shape and type is compared with the network's, without reading tensor data.

    Raises:
        CheckpointError: a file is cut short or unreadable, or a tensor is unknown, misshapen, of a wrong
            type, missing or there twice.
    """
    tensors, used = stored_tensors(folder), Used()
    if tensors and (fault := next(header_faults(tensors, layout, used), None)):
        raise CheckpointError(fault.message)
    return used


def check_headers(folder: Path, layout: Layout) -> int:
    """As `used_tensors`; returns the number of canonical tensors."""
    return sum(map(len, used_tensors(folder, layout).values()))


def read_weights(folder: Path, layout: Layout) -> dict[str, "Tensor"]:
    """Every tensor the network uses, by its canonical name. Headers are checked before any data is read."""
    if not check_headers(folder, layout):
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    weights: dict[str, Tensor] = {}
    for shard in shard_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                for part, tensor in layout.split(name, tensors.get_tensor(name)):
                    if (kind := str(tensor.dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
                        raise CheckpointError(
                            f"checkpoint tensor {name!r} is {kind}: quantised weights need the engine"
                        )
                    weights[part] = tensor
    return weights


def local_folder(name_or_path: str | Path, options: dict[str, Any]) -> Path:
    """The checkpoint's folder, downloaded first if it is a hub name. Takes the hub's arguments out of `options`."""
    from huggingface_hub import snapshot_download

    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    hub = {name: options.pop(name) for name in names if options.get(name) is not None}
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors"], **hub))


def _quoted(names: list[str]) -> str:
    return some([repr(name) for name in names])
