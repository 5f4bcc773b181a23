"""Names, shapes and types of a checkpoint's tensors, and the values of its scales"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from hunyuan_vllm.check.configs import ConfigFile
from hunyuan_vllm.checkpoint import HeaderFault, StoredTensor, Used, header_faults
from hunyuan_vllm.layout import FLOATS, CheckpointError, Layout, expected_tensors
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import Format, is_scale
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import plural


def check_tensors(tensors: Sequence[StoredTensor], config: ConfigFile, complete: bool, section: Section) -> Used:
    """Compare them with the network's; returns those that it uses.

    Args:
        complete: every shard could be read, so a tensor not found is missing.
    """
    assert config.network is not None and config.format is not None
    try:
        layout = config.format.layout(config.network)
    except CheckpointError as error:
        section.problem("config.json", str(error), "download config.json again, or correct that list")
        return {}
    used: Used = {}
    faults: dict[str, list[HeaderFault]] = defaultdict(list)
    for fault in header_faults(tensors, layout, used):
        faults[fault.kind].append(fault)
    contradictions = _contradictions(tensors, config.network, complete)
    other = "config.json is from another checkpoint: download both again" if contradictions else ""
    if contradictions:
        section.problem("config.json", f"the tensors have {'; '.join(contradictions)}", other)
    names = {kind: [fault.name for fault in found] for kind, found in faults.items()}
    missing = names.get("missing", [])
    if missing and not complete:
        section.skipped("missing", f"{plural(len(missing), 'tensor')} not found; they may be in a missing shard")
        missing = []
    again = other or "download the checkpoint again, or copy the config.json that belongs to it"
    weights = [name for name in missing if not is_scale(name)]
    list_tensors(section, "missing", "{} that config.json implies", again, weights)
    again = other or "convert again with hunyuan-vllm quantize, or set quantization_config to what is stored"
    scales = [name for name in missing if is_scale(name)]
    list_tensors(section, "scales", "{} missing; their weights are unusable", again, scales)
    again = other or "if the network was changed, it is a different model; otherwise download config.json again"
    list_tensors(section, "unknown", "{} not part of this network", again, names.get("unknown", []))
    again = other or "download config.json and the shards again"
    misshapen = [
        f"{tensor.name} is {list(tensor.shape)}, not {list(layout.shape(layout.parts(tensor.name)))}"
        for fault in faults["shapes"]
        if (tensor := fault.tensor)
    ]
    list_tensors(section, "shapes", "{} of another shape than config.json implies", again, misshapen)
    twice = [fault.message.removeprefix("checkpoint tensor ") for fault in faults["twice"]]
    again = "delete the shard that does not belong to the checkpoint"
    list_tensors(section, "twice", "{} stored twice", again, twice)
    _report_types(faults["types"], config.format, layout, section)
    known = {fault.tensor for fault in faults["unknown"]}.union(used)
    if unused := [tensor for tensor in tensors if tensor not in known]:
        size = sum(tensor.nbytes for tensor in unused)
        section.ok("unused", f"{plural(len(unused), 'tensor')} ({size / 1e6:,.1f} MB) that the network does not use")
    if section.sound:
        section.ok("tensors", f"{len(used):,}, all with the names, shapes and types that config.json implies")
    return used


def list_tensors(section: Section, subject: str, text: str, remedy: str, tensors: Sequence[str]) -> None:
    """A problem with these tensors, if there are any; {} in the text is their number."""
    if tensors:
        section.problem(subject, text.format(plural(len(tensors), "tensor")), remedy, tensors)


def _report_types(faults: list[HeaderFault], format: Format, layout: Layout, section: Section) -> None:
    surprising = defaultdict(list)
    for fault in faults:
        assert fault.tensor is not None
        surprising[fault.tensor.dtype, layout.types(layout.parts(fault.name)[0])].append(fault.name)
    for (dtype, allowed), names in surprising.items():
        text = f"{len(names):,} are {dtype} where {format.name} has {' or '.join(allowed)}"
        remedy = "vLLM would cast them to wrong values: correct quantization_config in config.json"
        if dtype in FLOATS:
            remedy = "name these projections in quantization_config's list of ignored layers, or convert again"
        section.problem("types", text, remedy, names)


def _contradictions(tensors: Iterable[StoredTensor], config: Network, complete: bool) -> list[str]:
    """Fields of the config that the tensors' names and shapes contradict: one line instead of thousands."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    seen: dict[str, int] = {}
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) == 2:
        seen["vocab_size"], seen["hidden_size"] = embedding
    if norm := shapes.get("model.layers.0.self_attn.query_layernorm.weight"):
        seen["head_dim"] = norm[0]
    head_dim = seen.get("head_dim", config.head_dim)
    for field, part in (("num_attention_heads", "q"), ("num_key_value_heads", "k")):
        projection = shapes.get(f"model.layers.0.self_attn.{part}_proj.weight", ())
        if len(projection) == 2:
            seen[field] = projection[0] // head_dim
    if complete:
        seen["num_hidden_layers"] = _count(r"^model\.layers\.(\d+)\.", shapes)
        seen["num_experts"] = max(_count(r"\.experts\.(\d+)\.", shapes), 1)
    if isinstance(config.num_experts, list) or any(".experts.gate_up_proj" in name for name in shapes):
        seen.pop("num_experts", None)
    stated = [(field, value, getattr(config, field)) for field, value in seen.items()]
    return [f"{field} {value}, config.json says {says}" for field, value, says in stated if value != says]


def _count(numbered: str, names: Iterable[str]) -> int:
    """One more than the largest number that the pattern finds."""
    return max((int(match[1]) + 1 for name in names if (match := re.search(numbered, name))), default=0)


READERS = 8
ODD_FACTOR = 1000  # times the median of the same scale in other layers and experts
AGAIN = "convert the BF16 checkpoint again with hunyuan-vllm quantize, or download the checkpoint again"


def check_scales(used: Used, config: ConfigFile, section: Section) -> None:
    """Read and check the scales and the packed weights' shapes."""
    stored = [tensor for tensor in used if is_scale(tensor.name) and tensor.dtype in FLOATS]
    with ThreadPoolExecutor(READERS) as pool:
        values = dict(zip(stored, pool.map(read_values, stored), strict=True))
    wrong = [text for tensor, value in values.items() if (text := _wrong(tensor.name, value))]
    list_tensors(section, "scales", "{} with impossible values", AGAIN, wrong)
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for tensor, value in values.items():
        if not _wrong(tensor.name, value):
            kinds[re.sub(r"\d+", "*", tensor.name)][tensor.name] = float(np.median(value))
    odd = []
    for group in kinds.values():
        usual = median(group.values())
        outside = {name: of for name, of in group.items() if not usual / ODD_FACTOR <= of <= usual * ODD_FACTOR}
        odd += [f"{name} is {of:.3g}, usually {usual:.3g}" for name, of in outside.items()]
    if odd:
        text = f"{len(odd):,} are over {ODD_FACTOR:,} times larger or smaller than in other layers and experts"
        section.warning("scales", text, f"compare their weights with the BF16 checkpoint's; or {AGAIN}", odd)
    _check_shapes(used, config, section)
    if values and not wrong:
        low = min(float(value.min()) for value in values.values())
        high = max(float(value.max()) for value in values.values())
        section.ok("scales", f"{len(values):,} tensors, {low:.2g}–{high:.2g}")


def read_values(tensor: StoredTensor) -> np.ndarray:
    """The values of a small tensor as a flat array; floats in float32."""
    raw = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.start)
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype in ("I32", "I64"):
        return raw.view(np.int32 if tensor.dtype == "I32" else np.int64)
    return raw.view(np.float16 if tensor.dtype == "F16" else np.float32).astype(np.float32)


def _wrong(name: str, values: np.ndarray) -> str:
    bad = values[~(np.isfinite(values) & (values > 0))]
    if not bad.size:
        return ""
    count = "" if values.size == 1 else f", one of {bad.size:,} in {values.size:,}"
    return f"{name} is {bad[0]:g}{count}"


def _check_shapes(used: Used, config: ConfigFile, section: Section) -> None:
    assert config.network is not None
    shapes = expected_tensors(config.network)
    wrong = []
    for tensor in used:
        stem, _, kind = tensor.name.rpartition(".")
        if kind == "weight_shape" and tensor.dtype in ("I32", "I64"):
            says, is_ = read_values(tensor).tolist(), list(shapes[f"{stem}.weight"])
            if says != is_:
                wrong.append(f"{tensor.name} says {says}, the weight is {is_}")
    list_tensors(section, "weight_shape", "{} unlike the shapes that config.json implies", AGAIN, wrong)
