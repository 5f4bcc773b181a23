"""What the converter's tests convert: small random checkpoints, calibrated on random token ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

Documents = list[list[int]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # two cores, and processes that are forked


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published shape in small, in two files."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "bf16", tiny_config(), shard_bytes=1_000_000)


@pytest.fixture(scope="session")
def documents() -> Documents:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in (70, 40, 90, 50)]


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, Tensor]]:
    """Reads all tensors of a checkpoint directory."""

    def read(directory: Path) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            held = load_file(file)
            assert not tensors.keys() & held.keys()
            tensors |= held
        return tensors

    return read
