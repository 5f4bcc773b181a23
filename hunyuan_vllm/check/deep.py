"""Every byte of a checkpoint's tensors: values that are not finite, and space that was never filled"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hunyuan_vllm.check.tensors import list_tensors
from hunyuan_vllm.checkpoint import Shard, StoredTensor
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import plural

CHUNK = 1 << 20
# Type → (integers of its width, the bits without the sign, those of infinity). As an integer, a float without its sign
# grows with its magnitude, so one maximum finds NaN and infinity, and zeros.
BITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}
INTEGER = (np.uint8, 0xFF, 0x100)


Counts = dict[StoredTensor, int]


def read_through(
    file: Path, tensors: Sequence[StoredTensor], advance: Callable[[int], None], stop: threading.Event
) -> tuple[Counts, Counts]:
    """Scan these tensors of a file, until `stop` is set: the values of each that are NaN or infinite, and its bytes in
    chunks of nothing but zeros; only of tensors that have any.

    Args:
        advance: is told how many bytes have been read since its last call.
    """
    not_finite: Counts = Counter()
    zero: Counts = Counter()
    with file.open("rb") as source:
        for tensor in tensors:
            width, without_sign, infinity = BITS.get(tensor.dtype, INTEGER)
            source.seek(tensor.start)
            left = tensor.nbytes
            while left and not stop.is_set():
                magnitudes = np.fromfile(source, width, min(CHUNK, left) // width().itemsize) & width(without_sign)
                if not magnitudes.size:
                    raise OSError("the file ends early")
                largest = int(magnitudes.max())
                if largest >= infinity:
                    not_finite[tensor] += int(np.count_nonzero(magnitudes >= width(infinity)))
                elif largest == 0:
                    zero[tensor] += magnitudes.nbytes
                left -= magnitudes.nbytes
                advance(magnitudes.nbytes)
    return not_finite, zero


AGAIN = "download their shards again"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # rows of padding may be zeros


def check_values(
    shards: Sequence[Shard], used: Mapping[StoredTensor, object], jobs: int, progress: Progress, section: Section
) -> None:
    """Read every byte of the tensors that the network uses, `jobs` files at a time."""
    tensors = {shard.file: [one for one in shard.tensors if one in used] for shard in shards}
    stop = threading.Event()
    not_finite: Counts = {}
    zero: Counts = {}

    def read(path: Path) -> None:
        try:
            found = read_through(path, tensors[path], progress.advance, stop)
            not_finite.update(found[0])
            zero.update(found[1])
        except OSError as error:
            text = f"it cannot be read completely: {error.strerror or error}"
            section.problem(path.name, text, "check the disk (dmesg), then download the file again")

    # The largest first, so that the last thread does not run alone for long.
    files = sorted(tensors, key=lambda path: -path.stat().st_size)
    with progress.stage("reading", sum(tensor.nbytes for held in tensors.values() for tensor in held)):
        pool = ThreadPoolExecutor(jobs)
        try:
            list(pool.map(read, files))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    odd = [f"{tensor.name} ({count:,} of {tensor.elements:,})" for tensor, count in not_finite.items()]
    list_tensors(section, "values", "{} with NaN or infinity", f"{AGAIN}; if they remain, it is broken", odd)
    all_zero = [tensor.name for tensor, size in zero.items() if size == tensor.nbytes]
    empty = [name for name in all_zero if not name.endswith(".bias")]
    list_tensors(section, "values", "{} of zeros only", f"{AGAIN}: their space was not filled", empty)
    holes = [
        f"{tensor.name} ({size >> 20} MiB)"
        for tensor, size in zero.items()
        if CHUNK <= size < tensor.nbytes and tensor.name not in EMBEDDINGS
    ]
    list_tensors(section, "values", "{} with long runs of zeros, as in an unfinished download", AGAIN, holes)
    if not (odd or empty or holes):
        count = plural(sum(map(len, tensors.values())), "tensor")
        section.ok("values", f"no NaN, infinity or long run of zeros in {count}")
