"""How many bytes of a checkpoint a decode step has to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

__all__ = ["Weights"]


@dataclass(frozen=True)
class Weights:
    """Bytes of the checkpoint by how often a step reads them."""

    always: float
    """Attention, norms, routers, shared MLPs and the head (the embedding, where they are tied)."""
    expert: float
    """One expert in every layer."""
    head: float

    @classmethod
    def of(cls, model: Path, projections: int = 2) -> Weights:
        """Of a bfloat16 checkpoint; or as the engine holds it, with so many bytes a value of a projection."""
        sizes: dict[str, float] = {}
        for file in model.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}
        sizes |= {name: size * projections / 2 for name, size in sizes.items() if name.endswith("_proj.weight")}
        embedding = sizes.pop("model.embed_tokens.weight")
        head = sizes.setdefault("lm_head.weight", embedding)
        routed = {name: size for name, size in sizes.items() if ".experts." in name}
        experts = {name.split(".experts.")[1].split(".")[0] for name in routed}
        routed_bytes = sum(routed.values())
        return cls(sum(sizes.values()) - routed_bytes, routed_bytes / max(len(experts), 1), head)

    def of_step(self, distinct_experts: float) -> float:
        """Bytes a decode step reads when it hits that many experts a layer."""
        return self.always + distinct_experts * self.expert

    def prompt_flops(self, topk: int) -> float:
        """Multiplications and additions for one token of a prompt: two for each bfloat16 weight but the head's."""
        return self.always + topk * self.expert - self.head
