"""Bring recorded golden checkpoints into this directory, small enough for git.

    python tests/golden/import_golden.py DIRECTORY

DIRECTORY holds one directory a checkpoint: config.json, generation_config.json, model.safetensors, ref_float32.json,
bf16_vs_fp32.json. Tensors are copied bit for bit into shards of about 1 MB; reference.json keeps of the records what
the tests compare (no top-5 lists; of the bfloat16 run its mean distance from float32, which is the tolerance).
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import write_shards  # noqa: E402

SHARD_BYTES = 1_000_000
KEPT = ("prompt", "prompt_logprobs", "greedy", "greedy_logprobs")


def convert(source: Path, target: Path) -> None:
    """Write one golden checkpoint."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    write_shards(target, iter(load_file(source / "model.safetensors").items()), SHARD_BYTES)
    record = json.loads((source / "ref_float32.json").read_text())
    reference = {
        "bfloat16_mean_distance": json.loads((source / "bf16_vs_fp32.json").read_text())["mean"],
        "items": [{key: item[key] for key in KEPT} for item in record["items"]],
    }
    (target / "reference.json").write_text(json.dumps(reference, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path in sorted(Path(sys.argv[1]).glob("*/")):
        convert(path, Path(__file__).parent / path.name)
