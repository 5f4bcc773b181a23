"""From what the user wrote to a scenario: names looked up, defaults filled in, contradictions refused."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.plan.advice import COUNTS, arrangements
from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import Network, PlannedModel, open_planned
from hunyuan_vllm.plan.scenario import Assumptions, Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import Scheme, find_scheme, scheme_of_checkpoint
from hunyuan_vllm.plan.verdict import judge
from hunyuan_vllm.util.errors import UserError

__all__ = ["Request", "make_scenario"]


@dataclass(frozen=True)
class Request:
    """The options of `hunyuan-vllm plan`; None where the user left the choice."""

    model: str
    gpu: str
    gpus: int | None
    tensor: int | None
    pipeline: int
    dcp: int
    scheme: str | None
    kv: str
    max_model_len: int | None
    utilization: float
    batched_tokens: int | None
    sequences: int | None
    eager: bool
    input_len: int | None
    output_len: int | None
    per_node: int
    node_link: float
    assumptions: Assumptions


def make_scenario(request: Request) -> tuple[Scenario, bool]:
    """The scenario, and whether the checkpoint is quantised on disk.

    Without a number of GPUs it is that of the ranks asked for, or the fewest on which it fits.

    Raises:
        UserError: a name is unknown, or two options contradict each other.
    """
    model, gpu = open_planned(request.model), find_gpu(request.gpu)
    tokens, sequences = vllm_limits(gpu)
    longest = request.max_model_len or model.config.max_position_embeddings
    written = request.output_len or max(1, min(256, longest // 8))
    scenario = Scenario(
        name=model.name,
        network=Network(model.config),
        gpu=gpu,
        gpus=request.gpus or (request.tensor or 1) * request.pipeline,
        tensor=request.tensor or 1,
        pipeline=request.pipeline,
        dcp=request.dcp,
        scheme=_scheme(request, model),
        kv=request.kv,
        max_model_len=longest,
        utilization=request.utilization,
        batched_tokens=request.batched_tokens or tokens,
        sequences=request.sequences or min(sequences, request.batched_tokens or sequences),
        eager=request.eager,
        input_len=request.input_len or max(1, min(2048, longest - written)),
        output_len=written,
        per_node=request.per_node,
        node_link=request.node_link,
        assumptions=request.assumptions,
        remarks=model.remarks,
    )
    if scenario.batched_tokens < scenario.sequences:
        raise UserError(
            f"--max-num-batched-tokens {scenario.batched_tokens} is below --max-num-seqs {scenario.sequences}: each "
            "sequence needs a token in a step"
        )
    if scenario.input_len + scenario.output_len > scenario.max_model_len:
        raise UserError(
            f"--input-len {scenario.input_len} and --output-len {scenario.output_len} are together longer than "
            f"--max-model-len {scenario.max_model_len}"
        )
    return _with_ranks(scenario, request), model.format.kind is not None


def _scheme(request: Request, model: PlannedModel) -> Scheme:
    held = scheme_of_checkpoint(model.format)
    if request.scheme is None:
        return held
    scheme = find_scheme(request.scheme)
    if model.format.kind is not None and scheme.name != held.name:
        raise UserError(
            f"--scheme {scheme.name}: {request.model} is quantised already, as {held.name}: leave --scheme out"
        )
    return scheme


def _with_ranks(scenario: Scenario, request: Request) -> Scenario:
    if request.tensor is not None:
        return scenario
    if request.gpus is not None:
        return scenario.changed(tensor=_largest(scenario, request.gpus // request.pipeline))
    return _fewest(scenario, request)


def _largest(scenario: Scenario, ranks: int) -> int:
    """The most tensor-parallel ranks that the weights divide over, as a server takes them by default."""
    form = scenario.scheme.format
    sizes = form.rank_sizes(scenario.config) if form else scenario.network.tensor_sizes
    return max((size for size in sizes if size <= ranks), default=1)


def _fewest(scenario: Scenario, request: Request) -> Scenario:
    """On the first number of GPUs that will do, within a node if no rank need share a cache; else on the most."""
    widest = scenario.per_node if request.dcp == 1 else scenario.config.num_attention_heads
    tried = [
        scenario.changed(gpus=gpus, tensor=tensor, pipeline=stages)
        for gpus in COUNTS
        for tensor, stages in arrangements(scenario.network, gpus)
        if tensor <= widest and request.pipeline in (1, stages)
    ]
    fitting = (candidate for candidate in tried if judge(candidate).fits)
    most = (candidate for candidate in tried if candidate.gpus == COUNTS[-1])
    return next(fitting, None) or next(most, scenario)
