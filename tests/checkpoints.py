"""Random checkpoints in the published layout, for tests and benchmarks.

    python tests/checkpoints.py mid DIRECTORY     # 1.1 billion parameters, 2.2 GB

Weights are seeded and representable in bfloat16 (the router, kept in float32, is not), and spread so that mistakes
show: norm weights are partly small or negative, routes are decisive, logits are not flat.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hunyuan_vllm
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.reference import HunYuanForCausalLM

ALPHA_ROPE = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}


def tiny_config(**overrides: Any) -> HunYuanConfig:
    """The published shape in small: CLA factor 2, top-1 of 4 experts, a shared expert, qk-norm, NTK-alpha RoPE."""
    fields: dict[str, Any] = dict(
        architectures=["HunYuanForCausalLM"],
        torch_dtype="bfloat16",
        vocab_size=320,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_experts=4,
        moe_topk=1,
        use_mixed_mlp_moe=True,
        num_shared_expert=1,
        use_cla=True,
        cla_share_factor=2,
        use_qk_norm=True,
        rope_scaling=ALPHA_ROPE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return HunYuanConfig(**(fields | overrides))


def mid_config(**overrides: Any) -> HunYuanConfig:
    """The benchmarks' shape: 1.108e9 parameters, of which a token reads 329 MB in bfloat16."""
    fields: dict[str, Any] = dict(
        vocab_size=8192,
        hidden_size=1280,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        num_experts=16,
        tie_word_embeddings=True,
    )
    return tiny_config(**(fields | overrides))


def v1_moe_config(**overrides: Any) -> HunYuanConfig:
    """Hunyuan-A13B in small, in its file's spelling: 457e6 parameters, top-8 of 64 experts, a shared one."""
    layers = 8
    fields: dict[str, Any] = dict(
        architectures=["HunYuanMoEV1ForCausalLM"],
        model_type="hunyuan_v1_moe",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=256,
        moe_intermediate_size=[256] * layers,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_head_dim=128,
        max_position_embeddings=4096,
        num_experts=64,
        moe_topk=[8] * layers,
        num_shared_expert=[1] * layers,
        use_cla=False,
        tie_word_embeddings=True,
    )
    return tiny_config(**(fields | overrides))


def v1_dense_config(**overrides: Any) -> HunYuanConfig:
    """A dense V1 model of 252e6 parameters."""
    fields: dict[str, Any] = dict(
        architectures=["HunYuanDenseV1ForCausalLM"],
        model_type="hunyuan_v1_dense",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        num_experts=1,
        use_mixed_mlp_moe=False,
        use_cla=False,
        tie_word_embeddings=True,
    )
    return tiny_config(**(fields | overrides))


def published_config(name: str) -> HunYuanConfig:
    """The config of a published model: a directory of hunyuan_vllm/plan/data, such as hunyuan-1.8b."""
    file = Path(hunyuan_vllm.__file__).parent / "plan" / "data" / name / "config.json"
    return HunYuanConfig(**json.loads(file.read_text()))


# What to change in `tiny_config` to reach the branches that the golden checkpoints leave out.
VARIANTS: dict[str, dict[str, Any]] = {
    "rope_plain": dict(rope_scaling=None),
    "rope_linear": dict(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope_dynamic_factor": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "head_dim_80": dict(head_dim=80),
    "head_dim_128": dict(head_dim=128),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "no_qk_norm": dict(use_qk_norm=False),
    "no_shared_expert": dict(use_mixed_mlp_moe=False),
    "two_shared_experts": dict(num_shared_expert=2),
    "cla_factor_3": dict(num_hidden_layers=5, cla_share_factor=3),
    "one_kv_head": dict(num_key_value_heads=1),
    "per_layer_fields": dict(
        num_experts=[4, 1, 8, 2],
        moe_topk=[1, 1, 3, 2],
        intermediate_size=[96, 160, 64, 96],
        num_shared_expert=[1, 1, 2, 1],
    ),
    "tied": dict(tie_word_embeddings=True),
    "v1_rope_plain": dict(architectures=["HunYuanMoEV1ForCausalLM"], use_cla=False, rope_scaling=None),
    "v1_biases": dict(model_type="hunyuan_v1_dense", num_experts=1, use_cla=False, attention_bias=True, head_dim=48),
    "v1_top1": dict(model_type="hunyuan_v1_moe", use_cla=False, moe_intermediate_size=64),
}

CONFIGS: dict[str, Callable[..., HunYuanConfig]] = {
    "tiny": tiny_config,
    "mid": mid_config,
    "v1_moe": v1_moe_config,
    "v1_dense": v1_dense_config,
}


def write_checkpoint(
    directory: Path,
    config: HunYuanConfig,
    *,
    seed: int = 0,
    fused: bool = False,
    stray: bool = False,
    shard_bytes: int = 512 << 20,
) -> Path:
    """Write config.json and safetensors shards into `directory`, which is made; returns it.

    Args:
        fused: qkv_proj and gate_and_up_proj instead of the separate tensors.
        stray: add the tensors that occur in published files and that the network does not use.
        shard_bytes: most bytes a shard holds, unless one tensor is larger; about that much is in memory at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed)
    if fused:
        tensors = iter(fuse(dict(tensors), config).items())
    if stray:
        tensors = iter(with_strays(dict(tensors), config).items())
    write_shards(directory, tensors, shard_bytes)
    (directory / "config.json").write_text(json.dumps(published_json(config), indent=1) + "\n")
    return directory


def write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write `tensors` as they come: model.safetensors, or numbered shards and their index."""
    where: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = count = 0

    def close() -> None:
        nonlocal shard, size, count
        save_file(shard, directory / f"shard-{count}", metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, count))
        shard, size, count = {}, 0, count + 1

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            close()
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    files = ["model.safetensors"]
    if count > 1:
        files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        weight_map = {name: files[number] for name, number in where.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    for number, file in enumerate(files):
        (directory / f"shard-{number}").rename(directory / file)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply `change` to a small checkpoint's tensors, in place; it ends as a single file."""
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def random_tensors(config: HunYuanConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of the network, layer by layer."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in HunYuanForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        yield name, _random(name, shape, config, generator)


def _random(name: str, shape: torch.Size, config: HunYuanConfig, generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        weight = torch.rand(shape, generator=generator) + 0.5
        if "query_layernorm" in name or "key_layernorm" in name:
            # Doubled: attention is then sharp enough for its mistakes to show. And a quarter small or negative:
            # dividing by them, or losing their sign, is then such a mistake.
            odd = torch.rand(shape, generator=generator) < 0.25
            weight = torch.where(odd, torch.rand(shape, generator=generator) - 0.7, 2 * weight)
        return weight.bfloat16()
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return (noise * 0.2).bfloat16()
    if name.endswith("gate.wg.weight"):
        return noise.mul_(3 / shape[-1] ** 0.5)
    if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
        return noise.bfloat16()
    gain = 3 if name in ("lm_head.weight", "model.embed_tokens.weight") else 1
    return noise.mul_(gain / shape[-1] ** 0.5).bfloat16()


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All experts of a layer in one tensor, as transformers holds them: gate first, and no ".weight"."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for module in {name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}:
        count = sum(name.startswith(f"{module}.") and name.endswith(".down_proj.weight") for name in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{module}.{expert}.{part}_proj.weight"] for expert in range(count)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{module}.gate_up_proj": torch.cat((gate, up), dim=1), f"{module}.down_proj": down}
    return stacked


def fuse(tensors: dict[str, Tensor], config: HunYuanConfig) -> dict[str, Tensor]:
    """Owners' q, k, v as qkv_proj, KV head by KV head [its query heads, k, v]; gate and up as gate_and_up_proj, up
    first."""
    fused = dict(tensors)
    head, kv_heads = config.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    for name in tensors:
        if ".self_attn.k_proj." in name:
            q, k, v = (fused.pop(name.replace(".k_proj.", f".{part}_proj.")) for part in "qkv")
            rows = []
            for kv_head in range(kv_heads):
                rows.append(q[kv_head * group * head : (kv_head + 1) * group * head])
                rows.append(k[kv_head * head : (kv_head + 1) * head])
                rows.append(v[kv_head * head : (kv_head + 1) * head])
            fused[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(rows)
        elif ".gate_proj." in name:
            gate, up = fused.pop(name), fused.pop(name.replace(".gate_proj.", ".up_proj."))
            fused[name.replace(".gate_proj.", ".gate_and_up_proj.")] = torch.cat((up, gate))
    return fused


def with_strays(tensors: dict[str, Tensor], config: HunYuanConfig) -> dict[str, Tensor]:
    """Add biases beside every projection, rotary buffers, and a head that a tied network must not use."""
    strayed = dict(tensors)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            bias = torch.randn(len(tensor), generator=generator).bfloat16()
            strayed.setdefault(name.removesuffix("weight") + "bias", bias)
    for layer in range(config.num_hidden_layers):
        rotary = f"model.layers.{layer}.self_attn.rotary_emb."
        strayed[f"{rotary}inv_freq"] = torch.rand(config.head_dim // 2, generator=generator)
        for table in ("cos_cached", "sin_cached"):
            strayed[f"{rotary}{table}"] = torch.rand(16, config.head_dim, generator=generator)
    if config.tie_word_embeddings:
        strayed["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    return strayed


def published_json(config: HunYuanConfig) -> dict[str, Any]:
    """The config as the published files spell it, remote code included."""
    fields = config.to_diff_dict()
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        del fields["head_dim"]
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    fields["torch_dtype"] = fields.pop("dtype")
    fields["auto_map"] = {
        "AutoConfig": "configuration_hunyuan.HunYuanConfig",
        "AutoModelForCausalLM": "hunyuan.HunYuanForCausalLM",
    }
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = CONFIGS[arguments.shape]()
    write_checkpoint(arguments.directory, config, seed=arguments.seed)
    print(f"{arguments.directory}: {arguments.shape}, seed {arguments.seed}")


if __name__ == "__main__":
    main()
