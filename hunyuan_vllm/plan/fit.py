"""Whether a set-up can run, and whether it fits into memory"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.kv_cache import check_pipeline, legal_partition
from hunyuan_vllm.plan.hardware import choose_backend, refusals
from hunyuan_vllm.plan.memory import Budget, Capacity, budgets, capacity
from hunyuan_vllm.plan.model import layer_matrices, padded_vocabulary
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.preflight import check_tensor_parallel
from hunyuan_vllm.util.text import gibibytes


def problems(scenario: Scenario) -> list[str]:
    """Each reason why this cannot run, apart from memory."""
    found = [_tensor(scenario), _pipeline(scenario), _gpus(scenario), _dcp(scenario), _length(scenario)]
    found += [scenario.scheme.problem(scenario.gpu), _attention(scenario)]
    if form := scenario.scheme.format:
        found.append(_refusal(form.check_ranks, scenario.config, scenario.tensor))
    return [problem for problem in found if problem]


def _refusal(check: Callable[[HunYuanConfig, int], None], config: HunYuanConfig, size: int) -> str | None:
    """The error of one of the engine's own checks; None if it passes."""
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
        return None  # `notes` names the setting that this cut needs
    return _refusal(check_pipeline, scenario.config, scenario.pipeline)


def _gpus(scenario: Scenario) -> str | None:
    if scenario.ranks <= scenario.gpus:
        return None
    return (
        f"{scenario.ranks} ranks (tensor {scenario.tensor} × pipeline {scenario.pipeline}) need "
        f"{scenario.ranks} GPUs, and there are {scenario.gpus}: use --gpus {scenario.ranks} or fewer ranks"
    )


def _dcp(scenario: Scenario) -> str | None:
    """vLLM's rules (`ModelConfig.verify_with_parallel_config`): only ranks that hold the same KV heads can share."""
    config, tensor, dcp = scenario.config, scenario.tensor, scenario.dcp
    if dcp == 1:
        return None
    kv_heads = config.num_key_value_heads
    if tensor <= kv_heads:
        return (
            f"decode_context_parallel_size={dcp} needs more tensor-parallel ranks ({tensor}) than KV heads "
            f"({kv_heads}): only ranks that hold the same KV head can share its tokens; leave it at 1"
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
    longest = scenario.config.longest_context
    if scenario.max_model_len <= longest:
        return None
    return f"--max-model-len {scenario.max_model_len} is beyond the model's context: use at most {longest}"


def _attention(scenario: Scenario) -> str | None:
    asked = scenario.gpu, scenario.config.head_dim, scenario.kv == "fp8", scenario.dcp
    if choose_backend(*asked) is not None:
        return None
    reasons = "; ".join(f"{name} {why}" for name, why in refusals(*asked))
    remedy = "use --kv auto" if scenario.kv == "fp8" else "use --dcp 1" if scenario.dcp > 1 else "use another GPU"
    return f"no attention backend of vLLM supports this on {scenario.gpu.name} ({reasons}): {remedy}"


def notes(scenario: Scenario) -> list[str]:
    """What the user of this set-up should know."""
    found = list(scenario.remarks)
    config = scenario.config
    if scenario.needs_partition and (cut := _refusal(check_pipeline, config, scenario.pipeline)):
        found.append(cut)
    if idle := scenario.gpus - scenario.ranks * scenario.replicas:
        idles = f"{idle} of {scenario.gpus} GPUs {'stays' if idle == 1 else 'stay'} idle"
        found.append(f"{idles}: an engine uses {scenario.ranks}")
    if scenario.replicas > 1:
        found.append(
            f"{scenario.replicas} engines of {scenario.ranks} GPUs each; capacities are per engine, rates are totals"
        )
    copies = scenario.tensor // config.num_key_value_heads
    if copies > 1 and scenario.dcp == 1:
        found.append(
            f"each of the {config.num_key_value_heads} KV heads is on {copies} of {scenario.tensor} ranks: "
            f"--dcp {copies} divides its tokens among them instead"
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
        found.append(f"kernels pad matrices with {padded} columns per rank to {tiles}; the weights include that")
    return found


@dataclass(frozen=True)
class Fit:
    """Whether a scenario runs and fits.

    Attributes:
        problems: why it cannot run; its memory is then not computed.
        budgets: one for each pipeline stage.
        shared, unshared: what the cache holds with CLA's sharing, and what it would hold without.
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
        """The stage with the least memory for a cache."""
        return min(self.budgets, key=lambda budget: budget.cache)


def check_fit(scenario: Scenario) -> Fit:
    if found := problems(scenario):
        return Fit(scenario, problems=found)
    rank_budgets = budgets(scenario)
    shared = capacity(scenario, rank_budgets)
    unshared = capacity(scenario, rank_budgets, sharing=False)
    fit = Fit(scenario, budgets=rank_budgets, shared=shared, unshared=unshared)
    return replace(fit, reasons=_reasons(fit))


def _reasons(fit: Fit) -> list[str]:
    scenario, budget = fit.scenario, fit.tightest
    reasons, usable = [], gibibytes(budget.taken)
    if not budget.starts:
        highest = int(100 * (1 - budget.outside / budget.total)) / 100
        reasons.append(
            f"CUDA and NCCL hold {gibibytes(budget.outside)} before vLLM takes its share, and --gpu-memory-utilization "
            f"{scenario.utilization} leaves {gibibytes(budget.total - budget.taken)}: use at most {highest}"
        )
    if budget.weights.total > budget.taken:
        reasons.append(f"the weights take {gibibytes(budget.weights.total)} per GPU, and vLLM may use {usable}")
    elif budget.cache <= 0:
        reasons.append(
            f"weights, activations and CUDA graphs take {gibibytes(budget.taken - budget.cache)} per GPU, and vLLM may "
            f"use {usable}: nothing is left for the KV cache"
        )
    elif fit.shared.tokens < scenario.max_model_len:
        reasons.append(
            f"the KV cache holds {fit.shared.tokens:,} tokens, and one sequence may have {scenario.max_model_len:,}"
        )
    return reasons
