"""Whether a set-up works and fits"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.kv_cache import check_pipeline, legal_partition
from hunyuan_vllm.plan.hardware import choose_backend, refusals
from hunyuan_vllm.plan.memory import Budget, Capacity, budgets, capacity
from hunyuan_vllm.plan.model import layer_matrices, padded_vocabulary
from hunyuan_vllm.plan.scenario import GIB, Scenario
from hunyuan_vllm.preflight import check_tensor_parallel


def problems(scenario: Scenario) -> list[str]:
    """Each reason why this cannot work; none if it can, memory aside."""
    found = [_tensor(scenario), _pipeline(scenario), _gpus(scenario), _dcp(scenario), _length(scenario)]
    found += [scenario.scheme.problem(scenario.gpu), _attention(scenario)]
    if form := scenario.scheme.format:
        found.append(_refusal(form.check_ranks, scenario.config, scenario.tensor))
    return [problem for problem in found if problem]


def _refusal(check: Callable[[HunYuanConfig, int], None], config: HunYuanConfig, size: int) -> str | None:
    """What a check of the engine's own says; None if it lets this pass."""
    try:
        check(config, size)
    except ValueError as error:
        return str(error)
    return None


def _tensor(scenario: Scenario) -> str | None:
    rows = padded_vocabulary(scenario.config)
    if rows % scenario.tensor:
        return f"tensor_parallel_size={scenario.tensor} does not divide the {rows} rows of the embedding"
    return _refusal(check_tensor_parallel, scenario.config, scenario.tensor)


def _pipeline(scenario: Scenario) -> str | None:
    if legal_partition(scenario.config, scenario.pipeline) is not None:
        return None  # where vLLM's own cut is another, `notes` says how to have this one
    return _refusal(check_pipeline, scenario.config, scenario.pipeline)


def _gpus(scenario: Scenario) -> str | None:
    if scenario.ranks <= scenario.gpus:
        return None
    return (
        f"{scenario.ranks} ranks (tensor {scenario.tensor} × pipeline {scenario.pipeline}) need as many GPUs, and "
        f"there are {scenario.gpus}: use --gpus {scenario.ranks} or fewer ranks"
    )


def _dcp(scenario: Scenario) -> str | None:
    """vLLM's rules (`ModelConfig.verify_with_parallel_config`): only ranks that hold the same KV heads can share."""
    config, tensor, dcp = scenario.config, scenario.tensor, scenario.dcp
    if dcp == 1:
        return None
    kv_heads = config.num_key_value_heads
    if tensor <= kv_heads:
        return (
            f"decode_context_parallel_size={dcp} needs more tensor-parallel ranks than KV heads ({kv_heads}), and "
            f"there are {tensor}: every rank has KV heads of its own and nothing to share; leave it at 1"
        )
    group = config.num_attention_heads // kv_heads
    legal = [size for size in range(1, tensor // kv_heads + 1) if group % size == 0 and tensor % size == 0]
    if dcp in legal:
        return None
    return (
        f"decode_context_parallel_size={dcp} is not possible with {tensor} ranks and {kv_heads} KV heads: use one of "
        f"{legal}"
    )


def _length(scenario: Scenario) -> str | None:
    longest = scenario.config.max_position_embeddings
    if scenario.max_model_len <= longest:
        return None
    return (
        f"--max-model-len {scenario.max_model_len} is beyond the model's max_position_embeddings: use at most {longest}"
    )


def _attention(scenario: Scenario) -> str | None:
    asked = scenario.gpu, scenario.config.head_dim, scenario.kv == "fp8", scenario.dcp
    if choose_backend(*asked) is not None:
        return None
    reasons = "; ".join(f"{name} {why}" for name, why in refusals(*asked))
    remedy = "use --kv auto" if scenario.kv == "fp8" else "use --dcp 1" if scenario.dcp > 1 else "use another GPU"
    return f"no attention backend of vLLM serves this on {scenario.gpu.name} ({reasons}): {remedy}"


def notes(scenario: Scenario) -> list[str]:
    """What a user of this set-up should know."""
    found = list(scenario.remarks)
    config = scenario.config
    if scenario.needs_partition and (cut := _refusal(check_pipeline, config, scenario.pipeline)):
        found.append(cut)
    if idle := scenario.gpus - scenario.ranks * scenario.replicas:
        idles = f"{idle} of {scenario.gpus} GPUs {'stays' if idle == 1 else 'stay'} idle"
        found.append(f"{idles}: {scenario.ranks} ranks an engine do not divide them")
    if scenario.replicas > 1:
        found.append(f"{scenario.replicas} engines of {scenario.ranks} GPUs each; capacities are of one, rates of all")
    copies = scenario.tensor // config.num_key_value_heads
    if copies > 1 and scenario.dcp == 1:
        found.append(
            f"{scenario.tensor} ranks hold each of {config.num_key_value_heads} KV heads {copies} times: "
            "--dcp spreads the tokens over the copies instead"
        )
    tried = refusals(scenario.gpu, config.head_dim, scenario.kv == "fp8", scenario.dcp)
    backend = choose_backend(scenario.gpu, config.head_dim, scenario.kv == "fp8", scenario.dcp)
    if tried and backend:
        found.append(f"attention runs on {backend.name}: {'; '.join(f'{name} {why}' for name, why in tried)}")
    if scenario.tensor_nodes > 1:
        found.append(
            f"{scenario.tensor} tensor-parallel ranks span {scenario.tensor_nodes} nodes: every layer waits for the "
            "network twice"
        )
    return found + _kernel_notes(scenario)


def _kernel_notes(scenario: Scenario) -> list[str]:
    scheme, gpu = scenario.scheme, scenario.gpu
    found = []
    if scheme.operands == "fp8" and scheme.uses_marlin(gpu):
        found.append(f"{gpu.name} has no FP8 units: weights stay in FP8 and are multiplied in BF16 (Marlin)")
    matrices = layer_matrices(scenario.config, 0, scenario.tensor)
    if padded := sorted(
        {matrix.inputs for matrix in matrices if scheme.padding(matrix, gpu) and matrix.cut == "inputs"}
    ):
        tiles = "Marlin's tiles" if scheme.uses_marlin(gpu) else "multiples of 16"
        found.append(f"kernels pad matrices with {padded} columns a rank to {tiles}; the weights include that")
    return found


@dataclass(frozen=True)
class Verdict:
    """The judgement of a scenario.

    Attributes:
        problems: why it cannot work at all; memory is then not looked at.
        reasons: why it does not fit.
        budgets: one for each pipeline stage.
        shared, unshared: what the cache holds with CLA's sharing, and what it would without.
    """

    scenario: Scenario
    problems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    shared: Capacity = Capacity(0, 1, 0)
    unshared: Capacity = Capacity(0, 1, 0)

    @property
    def fits(self) -> bool:
        return not (self.problems or self.reasons)

    @property
    def tightest(self) -> Budget:
        """The stage with least room for a cache."""
        return min(self.budgets, key=lambda budget: budget.cache)


def judge(scenario: Scenario) -> Verdict:
    """Check, then account."""
    if found := problems(scenario):
        return Verdict(scenario, problems=found)
    rank_budgets = budgets(scenario)
    shared = capacity(scenario, rank_budgets)
    verdict = Verdict(
        scenario, budgets=rank_budgets, shared=shared, unshared=capacity(scenario, rank_budgets, sharing=False)
    )
    return replace(verdict, reasons=_reasons(verdict))


def _reasons(verdict: Verdict) -> list[str]:
    scenario, budget = verdict.scenario, verdict.tightest
    reasons = []
    if not budget.starts:
        most = int(100 * (1 - budget.outside / budget.total)) / 100
        reasons.append(
            f"CUDA and NCCL hold {_gib(budget.outside)} before vLLM takes its share, and --gpu-memory-utilization "
            f"{scenario.utilization} leaves {_gib(budget.total - budget.taken)}: use at most {most}"
        )
    if budget.weights.total > budget.taken:
        reasons.append(f"the weights are {_gib(budget.weights.total)} a GPU, and vLLM may take {_gib(budget.taken)}")
    elif budget.cache <= 0:
        reasons.append(
            f"weights, activations and CUDA graphs are {_gib(budget.taken - budget.cache)} a GPU, and vLLM may take "
            f"{_gib(budget.taken)}: nothing is left for the KV cache"
        )
    elif verdict.shared.tokens < scenario.max_model_len:
        reasons.append(
            f"the KV cache holds {verdict.shared.tokens:,} tokens, and one sequence may have {scenario.max_model_len:,}"
        )
    return reasons


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
