"""The network that is planned: by name or by config"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import read_config
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.quant.quantization_config import read_format
from hunyuan_vllm.util.errors import UserError

Part = Literal["attention", "experts", "shared mlp", "dense mlp", "router"]
VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to it (`DEFAULT_VOCAB_PADDING_SIZE`)


@dataclass(frozen=True)
class Matrix:
    """A rank's shard of a weight, or of several that are fused into one: `[copies, outputs, inputs]`.

    Attributes:
        shards: checkpoint tensors fused along the outputs (q, k and v; gate and up).
        copies: number of experts; 1 outside experts.
        bias: outputs with a bias.
        cut: along which side tensor parallelism cuts it: a kernel may pad that side.
    """

    part: Part
    outputs: int
    inputs: int
    shards: int = 1
    copies: int = 1
    bias: int = 0
    cut: Literal["outputs", "inputs", "none"] = "outputs"

    @property
    def elements(self) -> int:
        return self.copies * self.outputs * self.inputs

    @property
    def quantised(self) -> bool:
        """Whether the int8 and FP8 schemes quantise it (`hunyuan_vllm.quant.layouts.is_quantised`)."""
        return self.part in ("attention", "experts", "shared mlp", "dense mlp")


@cache
def layer_kinds(config: Network, layers: range) -> list[tuple[int, int]]:
    """(a layer, how many of `layers` are like it): there are few kinds, and a sum over layers needs one of each."""
    alike: dict[tuple[int | bool, ...], list[int]] = {}
    for layer in layers:
        mlp = config.experts_at(layer), config.topk_at(layer), config.intermediate_at(layer)
        alike.setdefault((config.is_cross(layer), *mlp, config.shared_width_at(layer)), []).append(layer)
    return [(same[0], len(same)) for same in alike.values()]


def layer_matrices(config: Network, layer: int, ranks: int) -> Iterator[Matrix]:
    """The matrices of a layer on one of `ranks` tensor-parallel ranks; KV heads fewer than ranks are replicated."""
    yield from _attention(config, layer, ranks)
    experts, width = config.experts_at(layer), config.intermediate_at(layer) // ranks
    if experts == 1:
        yield from _mlp(config, "dense mlp", width)
        return
    yield Matrix("router", experts, config.hidden_size, cut="none")
    if shared := config.shared_width_at(layer):
        yield from _mlp(config, "shared mlp", shared // ranks)
    yield from _mlp(config, "experts", width, experts)


def _attention(config: Network, layer: int, ranks: int) -> Iterator[Matrix]:
    hidden, bias = config.hidden_size, config.attention_bias
    q_size = config.num_attention_heads // ranks * config.head_dim
    kv_size = max(1, config.num_key_value_heads // ranks) * config.head_dim
    fused = q_size if config.is_cross(layer) else q_size + 2 * kv_size
    yield Matrix("attention", fused, hidden, 1 if config.is_cross(layer) else 3, bias=fused * bias)
    yield Matrix("attention", hidden, q_size, bias=hidden * bias, cut="inputs")


def _mlp(config: Network, part: Part, width: int, copies: int = 1) -> Iterator[Matrix]:
    hidden, bias = config.hidden_size, config.mlp_bias
    yield Matrix(part, 2 * width, hidden, 2, copies, 2 * width * bias)
    yield Matrix(part, hidden, width, 1, copies, hidden * bias, "inputs")


def padded_vocabulary(config: Network) -> int:
    """Rows of the embedding and of the head as vLLM builds them."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def vectors(config: Network) -> int:
    """Elements of a layer's norm weights, which every rank holds whole."""
    return 2 * config.hidden_size + (2 * config.head_dim if config.use_qk_norm else 0)


DATA = Path(__file__).parent / "data"
# Published model, whose config is in `data/` → the path of its checkpoint in examples.
PUBLISHED = {
    "hunyuan-large": "/models/Hunyuan-A52B-Instruct",
    "hunyuan-a13b": "/models/Hunyuan-A13B-Instruct",
    "hunyuan-7b": "/models/Hunyuan-7B-Instruct",
    "hunyuan-4b": "/models/Hunyuan-4B-Instruct",
    "hunyuan-1.8b": "/models/Hunyuan-1.8B-Instruct",
    "hunyuan-0.5b": "/models/Hunyuan-0.5B-Instruct",
}
UNQUANTISED = ("lm_head", "embed_tokens", "wg", "gate")  # modules that no scheme here quantises


@dataclass(frozen=True)
class PlannedModel:
    """A network, of which only the config need exist."""

    name: str
    config: Network
    format: Format = Format()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a plan does not account for."""
        names = self.format.ignored.entries if self.format.ignored else []
        left = [name for name in names if name.rsplit(".", 1)[-1].strip("*") not in UNQUANTISED]
        if not left:
            return ()
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        return (f"the checkpoint leaves {left[0]}{more} unquantised; this plan counts these weights as quantised",)


def open_planned(given: str) -> PlannedModel:
    """A published model by name, `demo`, a checkpoint's directory, or a config.json alone, without weights."""
    if given in PUBLISHED:
        path = DATA / given
    elif given == demo.NAME:
        path = demo.path()
    else:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(
                f"--model {given} does not exist: give a directory with a config.json, that file, or one of "
                f"{', '.join(PUBLISHED)}"
            )
    fields, config = read_config(path)
    try:
        return PlannedModel(given, config, read_format(fields, path if path.is_dir() else path.parent))
    except ValueError as error:
        raise UserError(f"--model {given}: {error}") from None
