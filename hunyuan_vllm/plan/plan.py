"""From the command's options to a scenario, and what a plan says of it: rates, notes, the command that serves it"""

import shlex
from typing import Any

from hunyuan_vllm import demo
from hunyuan_vllm.layout import tensor_parallel_sizes
from hunyuan_vllm.plan.advice import COUNTS, arrangements
from hunyuan_vllm.plan.fit import Fit, check_fit, notes
from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import PUBLISHED, PlannedModel, open_planned
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import Scheme, find_scheme, scheme_of_checkpoint
from hunyuan_vllm.plan.speed import BATCHES, Decode, decode
from hunyuan_vllm.quant import schemes as quant
from hunyuan_vllm.util.errors import UserError

SUFFIXES = {"fp8": "-FP8", "int4": "-GPTQ-Int4"}  # of the checkpoints of a scheme, as published


def make_scenario(
    model: str,
    gpu: str,
    gpus: int | None = None,
    tensor: int | None = None,
    pipeline: int = 1,
    scheme: str | None = None,
    max_model_len: int | None = None,
    batched_tokens: int | None = None,
    sequences: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    **others: Any,
) -> Scenario:
    """A scenario from the options of `hunyuan-vllm plan`; None where the user left the choice.

    Without a number of GPUs it uses that of the ranks asked for, or the fewest on which it fits.

    Args:
        others: fields of `Scenario`.
    """
    found, kind = open_planned(model), find_gpu(gpu)
    default_tokens, default_sequences = vllm_limits(kind)
    longest = max_model_len or found.config.max_position_embeddings
    output_len = output_len or max(1, min(256, longest // 8))
    scenario = Scenario(
        name=found.name,
        config=found.config,
        gpu=kind,
        gpus=gpus or (tensor or 1) * pipeline,
        tensor=tensor or 1,
        pipeline=pipeline,
        scheme=_scheme(scheme, found),
        quantised=found.format.kind is not None,
        max_model_len=longest,
        batched_tokens=batched_tokens or default_tokens,
        sequences=sequences or min(default_sequences, batched_tokens or default_sequences),
        input_len=input_len or max(1, min(2048, longest - output_len)),
        output_len=output_len,
        remarks=found.remarks,
        **others,
    )
    if scenario.batched_tokens < scenario.sequences:
        raise UserError(
            f"--max-num-batched-tokens {scenario.batched_tokens} is below --max-num-seqs {scenario.sequences}: each "
            "sequence needs a token in a step"
        )
    if scenario.input_len + scenario.output_len > longest:
        raise UserError(
            f"--input-len {scenario.input_len} and --output-len {scenario.output_len} are together longer than "
            f"--max-model-len {longest}"
        )
    if tensor is not None:
        return scenario
    if gpus is None:
        return _fewest_gpus(scenario)
    # The most ranks that divide the weights, as a server chooses them.
    form = scenario.scheme.format
    sizes = form.rank_sizes(scenario.config) if form else tensor_parallel_sizes(scenario.config)
    return scenario.changed(tensor=max((size for size in sizes if size <= gpus // pipeline), default=1))


def _scheme(name: str | None, model: PlannedModel) -> Scheme:
    stored = scheme_of_checkpoint(model.format)
    if name is None:
        return stored
    scheme = find_scheme(name)
    if model.format.kind is None:
        return scheme
    if scheme.name not in (stored.name, model.format.scheme):
        raise UserError(f"--scheme {name}: {model.name} is already quantised to {stored.name}: leave --scheme out")
    return stored


def _fewest_gpus(scenario: Scenario) -> Scenario:
    """On the first number of GPUs that fits, within a node unless ranks share a cache; else on the most."""
    widest = scenario.per_node if scenario.dcp == 1 else scenario.config.num_attention_heads
    tried = [
        scenario.changed(gpus=gpus, tensor=tensor, pipeline=stages)
        for gpus in COUNTS
        for tensor, stages in arrangements(scenario.config, gpus)
        if tensor <= widest and scenario.pipeline in (1, stages)
    ]
    fitting = (candidate for candidate in tried if check_fit(candidate).fits)
    largest = (candidate for candidate in tried if candidate.gpus == COUNTS[-1])
    return next(fitting, None) or next(largest, scenario)


def serve_flags(scenario: Scenario) -> list[str]:
    """vLLM's flags for what differs from its defaults."""
    tokens, sequences = vllm_limits(scenario.gpu)
    given = {
        "--pipeline-parallel-size": (scenario.pipeline, 1),
        "--decode-context-parallel-size": (scenario.dcp, 1),
        "--kv-cache-dtype": (scenario.kv, "auto"),
        "--gpu-memory-utilization": (scenario.utilization, 0.92),
        "--max-num-batched-tokens": (scenario.batched_tokens, tokens),
        "--max-num-seqs": (scenario.sequences, sequences),
    }
    flags = ["--max-model-len", str(scenario.max_model_len)]
    for name, (value, default) in given.items():
        flags += [name, str(value)] if value != default else []
    flags += ["--enforce-eager"] if scenario.eager else []
    quantization = None if scenario.quantised else quant.SCHEMES[scenario.scheme.name].quantization
    return flags + (["--quantization", quantization] if quantization else [])


def serve_command(scenario: Scenario) -> str:
    """A shell command for the machine with the GPUs, or for the head node of their Ray cluster."""
    variables = {"TP_SIZE": str(scenario.tensor)}
    if (checkpoint := _checkpoint(scenario)) != demo.NAME:  # which is what a server without a path serves
        variables = {"MODEL_PATH": checkpoint} | variables
    if scenario.nodes > 1:
        variables["LOCAL_IP"] = "10.0.0.5"
    if scenario.needs_partition:
        variables["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, scenario.partition))
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*words, "hunyuan-vllm serve", *serve_flags(scenario)])


def preparation(scenario: Scenario) -> str | None:
    """How to get the checkpoint that the scheme needs; None where it needs none."""
    if scenario.scheme.name not in SUFFIXES or scenario.quantised or scenario.name in PUBLISHED:
        return None
    if scenario.scheme.name == "int4":
        return f"int4 needs {quant.SCHEMES['int4'].needs}"
    source, target = shlex.quote(scenario.name), shlex.quote(_checkpoint(scenario))
    return f"fp8 needs an FP8 checkpoint; make it with hunyuan-vllm quantize {source} {target} --scheme fp8"


def _checkpoint(scenario: Scenario) -> str:
    name = PUBLISHED.get(scenario.name, scenario.name.rstrip("/"))
    return name if scenario.quantised else name + SUFFIXES.get(scenario.scheme.name, "")


def rates(fit: Fit) -> list[Decode]:
    """Decoding at powers of two, up to the sequences that may run and whose cache fits."""
    scenario = fit.scenario
    largest = min(scenario.sequences, fit.shared.sequences(scenario.input_len + scenario.output_len))
    batches = [batch for batch in BATCHES if batch <= largest]
    if largest > 0 and largest not in batches:
        batches.append(largest)
    return [decode(scenario, batch) for batch in batches]


def lengths(scenario: Scenario) -> list[int]:
    """Powers of four from 2048 on, and the longest sequence: for which a plan says how many fit at once."""
    shorter = (2048 * 4**power for power in range(10))
    return [*(length for length in shorter if length < scenario.max_model_len), scenario.max_model_len]


def plan_notes(fit: Fit) -> list[str]:
    """What the user of this set-up should know and do, where it can run."""
    if fit.problems:
        return []
    step = preparation(fit.scenario) if fit.fits else None
    return [*notes(fit.scenario), *([step] if step else [])]
