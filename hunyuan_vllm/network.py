"""The fields of a Hunyuan config.json, checked when read; without transformers, whose import takes seconds

Field meanings, in the names of the published file, are in the docstring of `Network`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeGuard

ARCHITECTURES = ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM", "HunYuanDenseV1ForCausalLM")
DEFAULT_ROPE_THETA = 10000.0
PUBLISHED_CONTEXT = 262144
ROPE_TYPES = ("default", "linear", "dynamic")
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "cla_share_factor",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_qk_norm", "use_cla", "use_mixed_mlp_moe")
PER_LAYER_FIELDS = {  # field: minimum
    "num_experts": 1, "moe_topk": 1, "num_shared_expert": 0, "intermediate_size": 1, "moe_intermediate_size": 1,
}  # fmt: skip
# Fields that published files have and no published code reads: what another value would mean is not known.
FIXED_FIELDS = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "group_limited_greedy": False,
    "use_mla": False,
    "moe_layer_num_skipped": 0,
    "add_classification_head": False,
    "position_embedding_xdrope": False,
    "xdrope_section": None,
    "use_rotary_pos_emb": True,
    "norm_type": "rms",
}


@dataclasses.dataclass(kw_only=True, init=False, repr=False, eq=False)
class Network:
    """Shape of a Hunyuan network; the defaults are the widths of the published 389B model with every optional feature
    off, as the published code has it for a field that is absent.

    `model_type` "hunyuan" is written in the files of Hunyuan-Large and of some V1 models (A13B, 7B-0124);
    the class of a config is chosen by it.

    The fields in `PER_LAYER_FIELDS` may each be a list with one value a layer; read them through `experts_at`,
    `topk_at`, `intermediate_at`, `shared_experts_at` and `shared_width_at`. A list of equal values becomes that value.
    `attention_head_dim` is another name of `head_dim`. `rope_scaling` and `rope_theta` of the file become
    `rope_parameters`, which holds "rope_type" (default, linear or dynamic), "rope_theta" and, where they count,
    "factor" and "alpha"; a null one is absent.
    Fields this class does not know (training settings) are kept as attributes and change nothing, except `auto_map`:
    the remote code it names is never used, so it is dropped.

    Raises:
        ValueError: a field has a value the network cannot be built with; the message says which and what is allowed.
    """

    model_type: ClassVar[str] = "hunyuan"

    architectures: list[str] | None = None
    vocab_size: int = 129024
    hidden_size: int = 6400
    intermediate_size: int | list[int] = 18304
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    # Never None after construction: absent means num_attention_heads.
    num_key_value_heads: int = None  # type: ignore[assignment]
    # Never None after construction: absent means hidden_size / num_attention_heads.
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_qk_norm: bool = False
    use_cla: bool = False
    cla_share_factor: int = 1
    num_experts: int | list[int] = 1
    moe_topk: int | list[int] = 1
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int | list[int] = 1
    moe_intermediate_size: int | list[int] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Network":
        """The network that these fields describe, of the class of their `model_type`."""
        network = object.__new__(NETWORKS.get(fields.get("model_type", ""), cls))
        others = dict(fields)
        for field in dataclasses.fields(network):
            setattr(network, field.name, others.pop(field.name, field.default))
        others.pop("model_type", None)
        network.__post_init__(**others)
        return network

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        for name in PER_LAYER_FIELDS:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == self.num_hidden_layers and value.count(value[0]) == len(value):
                if name != "moe_topk" or value[0] != 1:  # see `renormalizes_at`
                    setattr(self, name, value[0])
        other_width = kwargs.pop("attention_head_dim", None)
        if self.head_dim is None:
            self.head_dim = other_width
        elif other_width not in (None, self.head_dim):
            raise _error("attention_head_dim", other_width, f"head_dim ({self.head_dim}) if both are given")
        self._check_counts("num_attention_heads", "hidden_size")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                allowed = f"a multiple of num_attention_heads ({self.num_attention_heads}) if head_dim is absent"
                raise _error("hidden_size", self.hidden_size, allowed)
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, rope in (("rope_scaling", kwargs.get("rope_scaling")), ("rope_parameters", self.rope_parameters)):
            if not isinstance(rope, dict | None):
                raise _error(name, rope, "an object such as {'type': 'dynamic', 'alpha': 1000.0}, or null")
        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])  # the base class writes into it
        keep: Callable[..., None] = getattr(super(), "__post_init__", self._keep)
        keep(**kwargs)
        self.validate()

    def _keep(self, rope_scaling: dict[str, Any] | None = None, rope_theta: float | None = None, **others: Any) -> None:
        """What transformers' base class does with the fields that this one does not declare."""
        self.rope_parameters = {"rope_theta": rope_theta, **(rope_scaling or self.rope_parameters or {})}
        self.standardize_rope_params()
        vars(self).update(others)

    @property
    def is_v1(self) -> bool:
        """Whether the file says that its network is of the V1 family; "hunyuan" with HunYuanForCausalLM does not."""
        return self.model_type != "hunyuan" or (self.architectures or [""])[0] in ARCHITECTURES[1:]

    @property
    def longest_context(self) -> int:
        """Tokens that may be served. The V1 models have `max_position_embeddings` of their training, and with alpha
        1000 go further; Hunyuan-Large, the one with CLA, is documented with its own."""
        scaled = int(self.max_position_embeddings * (self.rope_parameters.get("factor") or 1.0))
        published = PUBLISHED_CONTEXT if self.rope_parameters.get("alpha") == 1000 and not self.use_cla else 0
        return max(scaled, published, getattr(self, "model_max_length", None) or 0)

    def experts_at(self, layer: int) -> int:
        """Routed experts of a layer; 1 means that the layer has a plain dense MLP."""
        return self._at("num_experts", layer)

    def has_experts(self) -> bool:
        """Whether any layer has more than one expert."""
        return any(self.experts_at(layer) > 1 for layer in range(self.num_hidden_layers))

    def topk_at(self, layer: int) -> int:
        """Experts a token is routed to in a layer."""
        return self._at("moe_topk", layer)

    def renormalizes_at(self, layer: int) -> bool:
        """Whether the weights of a token's experts are divided by their sum.

        For top-1 the published code does so where `moe_topk` is a list, and transformers' hunyuan_v1_moe always;
        elsewhere the expert's weight is its probability.
        """
        return (
            self.topk_at(layer) > 1
            or self.model_type == "hunyuan_v1_moe"
            or (self.is_v1 and isinstance(self.moe_topk, list))
        )

    def shared_experts_at(self, layer: int) -> int:
        """Width of a layer's shared MLP in units of `intermediate_size`; 0 means that it has none."""
        if not self.use_mixed_mlp_moe or self.experts_at(layer) == 1:
            return 0
        return self._at("num_shared_expert", layer)

    def shared_width_at(self, layer: int) -> int:
        """Width of a layer's shared MLP; 0 means that it has none."""
        return self._at("intermediate_size", layer) * self.shared_experts_at(layer)

    def intermediate_at(self, layer: int) -> int:
        """Width of a layer's dense MLP, or of each of its experts."""
        if self.moe_intermediate_size is not None and self.experts_at(layer) > 1:
            return self._at("moe_intermediate_size", layer)
        return self._at("intermediate_size", layer)

    def kv_owner(self, layer: int) -> int:
        """The layer whose K and V this layer attends over: itself, unless it is a cross layer."""
        return layer - layer % self.cla_share_factor if self.use_cla else layer

    def is_cross(self, layer: int) -> bool:
        """Whether the layer has no K and V of its own (cross-layer attention)."""
        return self.kv_owner(layer) != layer

    def standardize_rope_params(self) -> None:
        """Bring `rope_parameters` to one form. Called on construction, and by vLLM after a user's overrides."""
        given = {key: value for key, value in (self.rope_parameters or {}).items() if value is not None}
        # An attribute `rope_theta` exists only where somebody set it after construction: it is the newer value.
        theta = self.__dict__.pop("rope_theta", None) or given.get("rope_theta", DEFAULT_ROPE_THETA)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise _error("rope_scaling type", kind, f"one of {', '.join(ROPE_TYPES)}")
        if not _is_number(theta) or theta <= 0:
            raise _error("rope_theta", theta, "a positive number")
        self.rope_parameters = {"rope_type": kind, "rope_theta": float(theta)}
        if kind == "default":
            return
        alpha, factor = given.get("alpha"), given.get("factor")
        if kind == "dynamic" and alpha is not None:
            if not _is_number(alpha) or alpha <= 0:
                raise _error("rope_scaling alpha", alpha, "a positive number")
            # Alpha alone sets the base. Readers that would multiply the maximum length by factor must find 1.
            self.rope_parameters |= {"alpha": float(alpha), "factor": 1.0}
            return
        if not _is_number(factor) or factor < 1:
            also = ", or alpha must be given" if kind == "dynamic" else ""
            raise _error("rope_scaling factor", factor, f"a number of at least 1 for type {kind!r}{also}")
        self.rope_parameters["factor"] = float(factor)

    def validate(self) -> None:
        """Check every field; `save_pretrained` calls this too."""
        self._check_counts(*COUNTS)
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads ({self.num_attention_heads})"
            raise _error("num_key_value_heads", self.num_key_value_heads, allowed)
        if self.head_dim % 2:
            raise _error("head_dim", self.head_dim, "even, for rotary embedding")
        if self.hidden_act != "silu":
            raise _error("hidden_act", self.hidden_act, "'silu'")
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps <= 0:
            raise _error("rms_norm_eps", self.rms_norm_eps, "a positive number")
        for name, published in FIXED_FIELDS.items():
            if (value := getattr(self, name, None)) is not None and value != published:
                raise _error(name, value, f"{published!r} or absent: no published code reads it")
        self._check_per_layer_fields()
        getattr(super(), "validate", lambda: None)()

    def _check_per_layer_fields(self) -> None:
        for name, minimum in PER_LAYER_FIELDS.items():
            value = getattr(self, name)
            if name == "moe_intermediate_size" and value is None:
                continue
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                allowed = f"one integer, or {self.num_hidden_layers} of them, one a layer; it has {len(value)}"
                raise _error(name, value, allowed)
            for item in value if isinstance(value, list) else [value]:
                if not _is_int(item) or item < minimum:
                    raise _error(name, value, f"an integer of at least {minimum}, or a list of them, one a layer")
        for layer in range(self.num_hidden_layers):
            experts, topk = self.experts_at(layer), self.topk_at(layer)
            if 1 < experts < topk:
                raise _error("moe_topk", topk, f"at most num_experts ({experts}), in layer {layer}")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "an integer of at least 1")

    def _at(self, name: str, layer: int) -> int:
        value = getattr(self, name)
        return value[layer] if isinstance(value, list) else value


@dataclasses.dataclass(kw_only=True, init=False, repr=False, eq=False)
class NetworkV1MoE(Network):
    """`model_type` "hunyuan_v1_moe": both norms and the shared MLP are there unless the file says otherwise."""

    model_type = "hunyuan_v1_moe"
    use_qk_norm: bool = True
    use_mixed_mlp_moe: bool = True


@dataclasses.dataclass(kw_only=True, init=False, repr=False, eq=False)
class NetworkV1Dense(Network):
    """`model_type` "hunyuan_v1_dense": both norms are there unless the file says otherwise."""

    model_type = "hunyuan_v1_dense"
    use_qk_norm: bool = True


NETWORKS = {kind.model_type: kind for kind in (Network, NetworkV1MoE, NetworkV1Dense)}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _error(field: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"HunYuanConfig: {field} is {value!r}; it must be {allowed}")
