"""Whether a set-up can run, and whether it fits into memory"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hunyuan_vllm.kv_cache import check_pipeline, legal_partition
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.memory import Budget, Capacity, budgets, capacity
from hunyuan_vllm.plan.model import layer_matrices, padded_vocabulary
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.preflight import check_tensor_parallel
from hunyuan_vllm.util.text import gibibytes


def problems(scenario: Scenario) -> list[str]:
    """Each reason why this cannot run, apart from memory."""
    return [problem for problem in _problems(scenario) if problem]


def _problems(scenario: Scenario) -> Iterator[str | None]:
    config, tensor, dcp = scenario.config, scenario.tensor, scenario.dcp
    rows = padded_vocabulary(config)
    if rows % tensor:
        yield f"tensor_parallel_size={tensor} does not divide the {rows} rows of the embedding"
    else:
        yield _refusal(check_tensor_parallel, config, tensor)
    if legal_partition(config, scenario.pipeline) is None:  # otherwise `notes` names the setting that the cut needs
        yield _refusal(check_pipeline, config, scenario.pipeline)
    if scenario.ranks > scenario.gpus:
        yield (
            f"{scenario.ranks} ranks (tensor {tensor} × pipeline {scenario.pipeline}) need {scenario.ranks} GPUs, and "
            f"there are {scenario.gpus}: use --gpus {scenario.ranks} or fewer ranks"
        )
    # vLLM's rules (`ModelConfig.verify_with_parallel_config`): only ranks that hold the same KV heads can share.
    kv_heads = config.num_key_value_heads
    group, copies = config.num_attention_heads // kv_heads, max(1, tensor // kv_heads)
    legal = [size for size in range(1, copies + 1) if group % size == 0 and tensor % size == 0]
    if dcp not in legal:
        yield (
            f"decode_context_parallel_size={dcp} is not possible with {tensor} ranks and {kv_heads} KV heads: use one "
            f"of {legal}"
        )
    if scenario.max_model_len > config.longest_context:
        yield (
            f"--max-model-len {scenario.max_model_len} is beyond the model's context: use at most "
            f"{config.longest_context}"
        )
    yield scenario.scheme.problem(scenario.gpu)
    backend, refused = scenario.attention_backend
    if backend is None:
        reasons = "; ".join(f"{name} {why}" for name, why in refused.items())
        remedy = "use --kv auto" if scenario.kv == "fp8" else "use --dcp 1" if dcp > 1 else "use another GPU"
        yield f"no attention backend of vLLM supports this on {scenario.gpu.name} ({reasons}): {remedy}"
    if form := scenario.scheme.format:
        yield _refusal(form.check_ranks, config, tensor)


def _refusal(check: Callable[[Network, int], None], config: Network, size: int) -> str | None:
    """The error of one of the engine's own checks; None if it passes."""
    try:
        check(config, size)
    except ValueError as error:
        return str(error)
    return None


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
    backend, refused = scenario.attention_backend
    if refused and backend:
        reasons = "; ".join(f"{name} {why}" for name, why in refused.items())
        found.append(f"attention runs on {backend}: {reasons}")
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
        reasons: why it does not fit.
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
