"""A checkpoint's files: found, their headers compared with the network before any data is read, and read"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safetensors import safe_open

from hunyuan_vllm.layout import CheckpointError, Layout, Shape
from hunyuan_vllm.network import NETWORKS, Network
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import some

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LFS_POINTER = b"version https://git-lfs"
READERS = 16  # on a network file system, waiting is most of reading a header


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its type as safetensors names it, and its bytes at `file[start : start + nbytes]`."""

    name: str
    dtype: str
    shape: Shape
    file: Path
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file, its tensors in the order of their bytes, and its `fault`, "" if there is none.

    A shard with a fault has the tensors of its header, if that could be read.
    """

    file: Path
    size: int
    tensors: tuple[StoredTensor, ...]
    fault: str = ""


def read_shards(files: Sequence[Path]) -> list[Shard]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_read, files))


def _read(path: Path) -> Shard:
    size = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start + file.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                return Shard(path, size, (), "is a Git LFS pointer instead of the file")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                return Shard(path, size, (), "is empty" if not size else "does not start like a safetensors file")
            file.seek(8)
            header = json.loads(file.read(length))
        tensors = tuple(sorted(_tensors(path, header, 8 + length), key=lambda tensor: tensor.start))
        fault = _fault(tensors, 8 + length, size)
    except OSError as error:
        return Shard(path, size, (), f"cannot be read ({error.strerror})")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = "is truncated inside its header" if size < 8 + length else f"has a header that cannot be read ({error})"
        return Shard(path, size, (), what)
    return Shard(path, size, tensors, fault)


def _tensors(path: Path, header: Any, data: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, data + begin, end - begin)


def _fault(tensors: Sequence[StoredTensor], data: int, size: int) -> str:
    position = data
    for tensor in tensors:
        if tensor.dtype not in ITEM_BYTES:
            return f"has {tensor.name!r} in the unknown type {tensor.dtype!r}"
        if tensor.start != position or tensor.nbytes != tensor.elements * ITEM_BYTES[tensor.dtype]:
            return f"has a header whose offsets do not fit its shapes, at {tensor.name!r}"
        position += tensor.nbytes
    if position > size:
        return f"is truncated: {size:,} of {position:,} bytes are there"
    return f"has {size - position:,} bytes after its last tensor" if position < size else ""


Used = dict[StoredTensor, tuple[str, ...]]  # stored tensor → the canonical tensors it holds


class HeaderFault(NamedTuple):
    """What is wrong with one tensor: `name` is the stored one's, or where `tensor` is None the canonical one's."""

    kind: Literal["unknown", "types", "shapes", "twice", "missing"]
    name: str
    message: str
    tensor: StoredTensor | None = None


def header_faults(tensors: Sequence[StoredTensor], layout: Layout, used: Used) -> Iterator[HeaderFault]:
    """Everything in which a checkpoint's tensors differ from the network's: the engine raises the first, `check` lists
    all. `used` is filled with the tensors that the network uses."""
    places: dict[str, Path] = {}
    for tensor in tensors:
        name, dtype = tensor.name, tensor.dtype
        try:
            parts = layout.parts(name)
        except CheckpointError as error:
            yield HeaderFault("unknown", name, str(error), tensor)
            continue
        if not parts:
            continue
        used[tensor] = parts
        if dtype not in (allowed := layout.types(parts[0])):
            message = (
                f"checkpoint tensor {name!r} is {dtype} where config.json promises {' or '.join(allowed)}: copy the "
                "config.json that belongs to the checkpoint, or correct its quantization_config"
            )
            yield HeaderFault("types", name, message, tensor)
        try:
            layout.names(name, tensor.shape)
        except CheckpointError as error:
            yield HeaderFault("shapes", name, str(error), tensor)
        for part in parts:
            if part in places:
                message = f"checkpoint tensor {part!r} is in {places[part]} and also in {tensor.file}"
                yield HeaderFault("twice", part, message)
            places[part] = tensor.file
    if missing := layout.missing(places):
        directory = f"{tensors[0].file.parent}" if tensors else "the checkpoint"
        message = f"{directory} lacks checkpoint tensor {some([repr(name) for name in missing])}"
        yield from (HeaderFault("missing", name, message) for name in missing)


INDEX_FILE = "model.safetensors.index.json"
PUBLISHED_AT = "tencent/Tencent-Hunyuan-Large on the Hugging Face hub, directory Hunyuan-A52B-Instruct"
# Reads pickled tensors without running what else the file holds, a file at a time.
UNPICKLE = (
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "[save_file({{name: tensor.clone() for name, tensor in torch.load(file, weights_only=True).items()}}, "
    "file[:-3] + 'safetensors') for file in glob.glob('{}/pytorch_model*.bin')]\""
)


def read_index(directory: Path) -> dict[str, Any] | None:
    """The index of a sharded checkpoint: "weight_map" (tensor → file name) and perhaps "metadata". None without one."""
    index = directory / INDEX_FILE
    if not index.exists():
        return None
    try:
        content = json.loads(index.read_text())
        sorted(content["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}): download it again") from None
    return content


def read_config(path: Path) -> tuple[dict[str, Any], Network]:
    """A checkpoint's config.json as it is, and the network that it describes; `path` is its directory or the file.

    Raises:
        UserError: there is none, it is damaged, or it is another model's.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        if path.is_dir():
            raise UserError(f"{path} {': '.join(missing_config(path))}") from None
        raise UserError(
            f"{path} does not exist: name a checkpoint's directory; one on the hub is downloaded first"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): download it again") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in NETWORKS:
        raise UserError(f"{file} has model_type {kind!r}; Hunyuan checkpoints have one of {', '.join(NETWORKS)}")
    try:
        return fields, Network.read(fields)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def missing_config(directory: Path) -> tuple[str, str]:
    """What is wrong with a directory without config.json, as the end of the sentence "DIRECTORY …"; and what to do."""
    if inner := sorted(path.parent.name for path in directory.glob("*/config.json")):
        return f"is not a checkpoint, but its subdirectories are ({', '.join(inner)})", "name one of them"
    if (directory / "adapters.safetensors").exists():
        return "is an adapter of MLX, not a checkpoint", "merge it with mlx_lm.fuse, or train one with hunyuan-vllm"
    if (directory / "adapter_config.json").exists():
        return "is an adapter, not a checkpoint", "name its checkpoint, or merge both with hunyuan-vllm merge-lora"
    if gguf := _gguf(directory):
        return gguf
    return "has no config.json", f"copy it from the checkpoint that the weights belong to; published: {PUBLISHED_AT}"


def missing_weights(directory: Path) -> tuple[str, str]:
    """The same of a directory that has no *.safetensors."""
    if any(directory.glob("pytorch_model*.bin")):
        return "has pickled weights (*.bin) and no *.safetensors", f"convert them with {UNPICKLE.format(directory)}"
    if gguf := _gguf(directory):
        return gguf
    return "has no *.safetensors", f"copy all files of the checkpoint there; published: {PUBLISHED_AT}"


def _gguf(directory: Path) -> tuple[str, str] | None:
    files = sorted(file.name for file in directory.glob("*.gguf"))
    return (f"has {_quoted(files)} of llama.cpp, which is not served", "take the safetensors files") if files else None


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are. Empty for other formats."""
    index = read_index(directory)
    if index is None:
        return sorted(directory.glob("*.safetensors"))
    names = sorted(set(index["weight_map"].values()))
    absent = [name for name in names if not (directory / name).exists()]
    if absent:
        raise CheckpointError(
            f"{directory / INDEX_FILE} names {_quoted(absent)}, not in {directory}: download the missing files"
        )
    return [directory / name for name in names]


def stored_tensors(directory: Path) -> list[StoredTensor]:
    """The tensors of a checkpoint, from its headers."""
    shards = read_shards(shard_files(directory))
    for shard in shards:
        if shard.fault:
            raise CheckpointError(f"{shard.file} {shard.fault}: download it again")
    return [tensor for shard in shards for tensor in shard.tensors]


def used_tensors(directory: Path, layout: Layout) -> Used:
    """The stored tensors that the network uses, each with the canonical ones that it holds; none without weights.

    Every tensor's name, shape and type is compared with the network's, without reading tensor data.

    Raises:
        CheckpointError: a file is truncated or unreadable, or a tensor is unknown, misshapen, of a wrong
            type, missing or there twice.
    """
    tensors, used = stored_tensors(directory), Used()
    if tensors and (fault := next(header_faults(tensors, layout, used), None)):
        raise CheckpointError(fault.message)
    return used


def check_headers(directory: Path, layout: Layout) -> int:
    """As `used_tensors`; returns the number of canonical tensors."""
    return sum(map(len, used_tensors(directory, layout).values()))


def read_weights(directory: Path, layout: Layout) -> dict[str, "Tensor"]:
    """Every tensor the network uses, by its canonical name. Headers are checked before any data is read."""
    if not check_headers(directory, layout):
        raise CheckpointError(f"{directory} holds no *.safetensors file")
    weights: dict[str, Tensor] = {}
    for shard in shard_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                for part, tensor in layout.split(name, tensors.get_tensor(name)):
                    if (kind := str(tensor.dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
                        raise CheckpointError(
                            f"checkpoint tensor {name!r} is {kind}: quantised weights need the engine"
                        )
                    weights[part] = tensor
    return weights


def local_directory(name_or_path: str | Path, options: dict[str, Any]) -> Path:
    """The checkpoint's directory, downloaded first if it is a hub name. Takes the hub's arguments out of `options`."""
    from huggingface_hub import snapshot_download

    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    hub = {name: options.pop(name) for name in names if options.get(name) is not None}
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors"], **hub))


def _quoted(names: list[str]) -> str:
    return some([repr(name) for name in names])
