"""A quantisation scheme's bytes per matrix, its rate of arithmetic, and the GPUs that support it"""

from dataclasses import dataclass, replace
from math import inf

from hunyuan_vllm.plan.hardware import Gpu
from hunyuan_vllm.plan.model import Matrix
from hunyuan_vllm.quant import schemes as quant
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.quant.layouts import StoredTensors, gptq

BF16, FLOAT32, INT64 = 2, 4, 8


@dataclass(frozen=True)
class Scheme:
    """A way to hold and multiply the quantised matrices.

    Attributes:
        channel_scales: bytes of a scale per output channel, on GPUs and on CPUs.
        tensor_scales: one float32 scale a tensor, and one for its input.
        packs: on GPUs the weight's shape is kept beside it: two int64, of an expert two BF16.
        operands: what its products are computed in, on GPUs that have the units.
        capability: minimum compute capability of its kernels, and the first that they do not support.
        stored: how one of vLLM's own methods keeps a matrix, for a checkpoint that is stored so.
        format: the format of such a checkpoint.
        marlin_below: below this compute capability its kernels are Marlin's, which compute in BF16 and pad to tiles.
    """

    name: str
    itemsize: float = BF16
    channel_scales: tuple[int, int] = (0, 0)
    tensor_scales: bool = False
    packs: bool = False
    operands: str = "bf16"
    capability: tuple[tuple[int, int], tuple[float, int]] = ((8, 0), (inf, 0))
    marlin_below: tuple[float, int] = (0, 0)
    stored: StoredTensors | None = None
    format: Format | None = None

    @property
    def quantises(self) -> bool:
        return self.itemsize < BF16

    def parameter_bytes(self, matrix: Matrix, on_cpu: bool = False) -> int:
        """Bytes of the parameters that vLLM makes for a matrix: weight, scales and bias."""
        if matrix.part == "router":
            return FLOAT32 * matrix.elements
        bias = BF16 * matrix.copies * matrix.bias
        if not self.quantises or not matrix.quantised:
            return BF16 * matrix.elements + bias
        if self.stored is not None:
            return matrix.copies * self.stored.bytes(matrix.outputs, matrix.inputs) + bias
        scales = matrix.copies * matrix.outputs * self.channel_scales[on_cpu]
        if self.tensor_scales:  # an expert's fused tensors have one input scale together
            inputs = matrix.copies if matrix.part == "experts" else matrix.shards
            scales += FLOAT32 * (matrix.copies * matrix.shards + inputs)
        if self.packs and not on_cpu:
            scales += 2 * BF16 * matrix.copies if matrix.part == "experts" else 2 * INT64
        return int(self.itemsize * matrix.elements) + scales + bias

    def uses_marlin(self, gpu: Gpu) -> bool:
        return gpu.capability < self.marlin_below

    def padding(self, matrix: Matrix, gpu: Gpu) -> int:
        """Bytes that the GPU's kernel adds to a matrix while packing it."""
        if not (self.quantises and matrix.quantised):
            return 0
        outputs, inputs = matrix.outputs, matrix.inputs
        if self.uses_marlin(gpu):
            outputs, inputs = _marlin_shape(matrix)
        elif self.operands == "fp8" and matrix.part != "experts":
            # CUTLASS' FP8 products of linears take multiples of 16; its int8 ones leave other shapes to Triton.
            outputs, inputs = _up(outputs, 16), _up(inputs, 16)
        more = outputs * inputs - matrix.outputs * matrix.inputs
        return matrix.copies * (int(self.itemsize * more) + self.channel_scales[0] * (outputs - matrix.outputs))

    def rate(self, gpu: Gpu) -> float:
        """Operations a second in its products, dense."""
        operands = "bf16" if self.uses_marlin(gpu) else self.operands
        fp8 = gpu.fp8_tflops or 0
        tera = {"bf16": gpu.bf16_tflops, "fp8": fp8, "fp4": 2 * fp8, "int8": gpu.int8_tops}[operands]
        return 1e12 * (tera or 0)

    def problem(self, gpu: Gpu) -> str | None:
        """Why this GPU cannot run it; None if it can."""
        lowest, beyond = self.capability
        if lowest <= gpu.capability < beyond:
            return None
        here = f"{gpu.name} has compute capability {_dotted(gpu.capability)}"
        if gpu.capability < lowest:
            return f"{self.name} needs compute capability {_dotted(lowest)}, and {here}"
        return f"vLLM has {self.name} kernels only below compute capability {_dotted(beyond)}, and {here}"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16"),
        Scheme("int8", itemsize=1, channel_scales=(BF16, FLOAT32), packs=True, marlin_below=(inf, 0)),
        Scheme(
            "int8-w8a8",
            itemsize=1,
            channel_scales=(FLOAT32, FLOAT32),
            operands="int8",
            capability=((8, 0), (10, 0)),  # vLLM's CUTLASS int8 products end before Blackwell
        ),
        Scheme("fp8", itemsize=1, tensor_scales=True, operands="fp8", marlin_below=(8, 9)),
    )
}


# As published: GPTQ with groups of 128.
GPTQ = Format("gptq", "GPTQ, 4 bits, groups of 128", "int4", False, lambda linear: gptq(4, 128), None, 4)


def find_scheme(name: str) -> Scheme:
    """Raises UserError if the name is unknown."""
    return SCHEMES[quant.find_scheme(name, SCHEMES).name]


def scheme_of_checkpoint(form: Format) -> Scheme:
    if form.stored is None or form.ours:
        return SCHEMES[str(form.scheme)]
    marlin: dict[str, tuple[float, int]] = {"bf16": (inf, 0), "fp8": (8, 9), "fp4": (10, 0), "int8": (0, 0)}
    return Scheme(
        str(form.kind),
        itemsize=form.bits / 8,
        operands=form.operands,
        marlin_below=marlin[form.operands],
        stored=form.stored("model.layers.0.self_attn.q_proj"),
        format=form,
    )


SCHEMES["int4"] = replace(scheme_of_checkpoint(GPTQ), name="int4")


def _marlin_shape(matrix: Matrix) -> tuple[int, int]:
    """Marlin's tiles: vLLM's `marlin_padded_nk`, and for experts `marlin_moe_padded_intermediate`."""
    outputs, inputs = matrix.outputs, matrix.inputs
    if matrix.part != "experts":
        families = (_up(outputs, 64), _up(inputs, 128)), (_up(outputs, 128), _up(inputs, 64))
        return min(families, key=lambda shape: (shape[0] * shape[1], sum(shape)))
    if matrix.cut == "inputs":
        return outputs, _up(inputs, 64)
    return matrix.shards * _up(outputs // matrix.shards, 64), inputs


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _dotted(capability: tuple[float, int]) -> str:
    return f"{capability[0]:.0f}.{capability[1]}"
