"""HunYuanConfig: what it reads from config.json, what it refuses, and what vLLM then sees."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ALPHA_ROPE, published_json, tiny_config
from golden_data import GOLDEN, LARGE_NAMES, V1_NAMES
from transformers import AutoConfig

from hunyuan_vllm.config import HunYuanConfig, HunYuanV1DenseConfig, HunYuanV1MoEConfig
from hunyuan_vllm.network import Network
from hunyuan_vllm_plugin import register


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    AutoConfig.register("hunyuan", HunYuanConfig, exist_ok=True)


@pytest.mark.parametrize("name", LARGE_NAMES)
def test_published_file_loads_without_remote_code(name: str) -> None:
    published = json.loads((GOLDEN / name / "config.json").read_text())
    assert "auto_map" in published
    config = AutoConfig.from_pretrained(GOLDEN / name)
    assert type(config) is HunYuanConfig
    assert config.architectures == ["HunYuanForCausalLM"]
    assert (config.head_dim, config.num_key_value_heads) == (32, 2)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0}
    for field in ("use_cla", "cla_share_factor", "num_experts", "moe_topk", "tie_word_embeddings", "capacity_factor"):
        assert getattr(config, field) == published[field]
    assert not hasattr(config, "auto_map")


def test_published_v1_files_have_the_class_of_their_model_type() -> None:
    read = {name: HunYuanConfig.from_pretrained(GOLDEN / name) for name in V1_NAMES}
    assert {name: type(config) for name, config in read.items()} == {
        "v1_a13b": HunYuanConfig,
        "v1_moe_tf": HunYuanV1MoEConfig,
        "v1_7b": HunYuanV1DenseConfig,
        "v1_1_8b": HunYuanV1DenseConfig,
        "v1_7b_0124": HunYuanConfig,
    }
    for name, config in read.items():
        assert config.model_type == json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
        assert config.head_dim == 32 and config.use_qk_norm and not config.is_cross(1)
        assert config.rope_parameters["alpha"] == 1000.0
        assert config.is_v1 == (name != "v1_7b_0124")
    for name, width in (("v1_a13b", 32), ("v1_moe_tf", 24)):
        config = read[name]
        assert (config.experts_at(1), config.topk_at(1), config.renormalizes_at(1)) == (16, 8, True)
        assert config.intermediate_at(1) == config.shared_width_at(1) == width


@pytest.mark.parametrize("name", [*LARGE_NAMES, *V1_NAMES])
def test_a_network_is_read_as_its_config_is(name: str) -> None:
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    network, config = Network.read(fields), HunYuanConfig.from_pretrained(GOLDEN / name)
    assert isinstance(config, type(network)) and not isinstance(network, HunYuanConfig)
    for field in dataclasses.fields(network):
        assert getattr(network, field.name) == getattr(config, field.name), field.name
    assert (network.is_v1, network.longest_context) == (config.is_v1, config.longest_context)
    assert not hasattr(network, "auto_map") and network.model_type == config.model_type


@pytest.mark.parametrize("name", ["cla4_top1", *V1_NAMES])
def test_a_saved_config_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config = HunYuanConfig.from_pretrained(GOLDEN / name)
    config.save_pretrained(tmp_path)
    again = HunYuanConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(again) is type(config) is type(HunYuanConfig(**config.to_dict()))
    assert name != "cla4_top1" or again.capacity_factor == 1.0


def test_the_heads_width_has_two_names() -> None:
    assert tiny_config(attention_head_dim=48).head_dim == tiny_config(head_dim=48, attention_head_dim=48).head_dim == 48
    assert tiny_config(attention_head_dim=None).head_dim == 32
    with pytest.raises(ValueError, match=r"attention_head_dim is 48; it must be head_dim \(32\)"):
        tiny_config(head_dim=32, attention_head_dim=48)


def test_experts_may_have_another_width_than_the_shared_mlp() -> None:
    config = tiny_config(num_experts=[1, 4, 4, 4], moe_intermediate_size=[32, 32, 64, 32], num_shared_expert=2)
    assert [config.intermediate_at(layer) for layer in range(4)] == [96, 32, 64, 32]
    assert [config.shared_width_at(layer) for layer in range(4)] == [0, 192, 192, 192]


@pytest.mark.parametrize(
    ("fields", "renormalizes"),
    [
        ({}, False),
        ({"architectures": ["HunYuanMoEV1ForCausalLM"]}, False),
        ({"architectures": ["HunYuanMoEV1ForCausalLM"], "moe_topk": [1, 1, 1, 1]}, True),
        ({"model_type": "hunyuan_v1_moe"}, True),
        ({"moe_topk": [1, 1, 1, 1]}, False),
    ],
)
def test_the_weight_of_a_single_expert(fields: dict[str, Any], renormalizes: bool) -> None:
    assert tiny_config(**fields).renormalizes_at(0) == renormalizes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_topk_prob", False),
        ("routed_scaling_factor", 2.5),
        ("n_group", 8),
        ("topk_group", 4),
        ("group_limited_greedy", True),
        ("use_mla", True),
        ("moe_layer_num_skipped", 1),
        ("add_classification_head", True),
        ("position_embedding_xdrope", True),
        ("xdrope_section", [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_a_field_that_no_published_code_reads_must_have_its_published_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .* no published code reads it"):
        tiny_config(**{field: value})


def test_absent_fields_mean_what_the_published_code_means() -> None:
    config = HunYuanConfig(hidden_size=512, num_attention_heads=8, num_hidden_layers=4)
    assert not (config.use_qk_norm or config.use_cla or config.use_mixed_mlp_moe or config.tie_word_embeddings)
    assert not (config.attention_bias or config.mlp_bias)
    assert (config.cla_share_factor, config.num_experts, config.num_shared_expert, config.moe_topk) == (1, 1, 1, 1)
    assert (config.num_key_value_heads, config.head_dim) == (8, 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_scaling": None}, {"rope_type": "default"}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": None}, {"rope_type": "default"}),
        ({"rope_scaling": ALPHA_ROPE}, {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}),
        ({"rope_scaling": {"type": "dynamic", "alpha": 50}}, {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}),
        (
            {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": None}},
            {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
        ),
        # With alpha, factor counts for nothing; left at 4 it would quadruple the maximum length in other readers.
        (
            {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 4.0}},
            {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
        ),
        (
            {"rope_scaling": {"type": "dynamic", "alpha": None, "factor": 2}},
            {"rope_type": "dynamic", "factor": 2.0},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": None}}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
        ),
    ],
)
def test_rope_is_brought_to_one_form(given: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(given)
    assert HunYuanConfig(**given).rope_parameters == {"rope_theta": 10000.0} | expected
    assert json.dumps(given) == before, "the caller's dictionary was written to"


def test_owners_and_cross_layers() -> None:
    three = tiny_config(num_hidden_layers=8, cla_share_factor=3)
    assert [three.kv_owner(layer) for layer in range(8)] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert [three.is_cross(layer) for layer in range(8)] == [False, True, True, False, True, True, False, True]
    off = tiny_config(use_cla=False, cla_share_factor=2)
    assert [off.kv_owner(layer) for layer in range(4)] == [0, 1, 2, 3]
    assert not any(off.is_cross(layer) for layer in range(4))


def test_per_layer_fields() -> None:
    config = tiny_config(
        num_experts=[1, 4, 4, 8],
        moe_topk=[1, 1, 2, 2],
        intermediate_size=[64, 32, 32, 16],
        num_shared_expert=[1, 1, 2, 0],
    )
    layers = range(4)
    assert [config.experts_at(layer) for layer in layers] == [1, 4, 4, 8]
    assert [config.topk_at(layer) for layer in layers] == [1, 1, 2, 2]
    assert [config.intermediate_at(layer) for layer in layers] == [64, 32, 32, 16]
    assert [config.shared_experts_at(layer) for layer in layers] == [0, 1, 2, 0], "a dense layer has none"
    assert [tiny_config(use_mixed_mlp_moe=False).shared_experts_at(layer) for layer in layers] == [0, 0, 0, 0]
    uniform = tiny_config(num_experts=[4, 4, 4, 4], moe_topk=[2, 2, 2, 2])
    assert (uniform.num_experts, uniform.moe_topk, uniform.topk_at(3)) == (4, 2, 2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 130}, ["hidden_size is 130", "num_attention_heads (4)", "head_dim"]),
        ({"hidden_size": "128"}, ["hidden_size is '128'", "integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
        ({"num_attention_heads": None}, ["num_attention_heads is None"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor of num_attention_heads (4)"]),
        ({"head_dim": 33}, ["head_dim is 33", "even"]),
        ({"cla_share_factor": 0}, ["cla_share_factor is 0", "at least 1"]),
        ({"use_cla": "yes"}, ["use_cla is 'yes'", "true or false"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps is 0", "positive"]),
        ({"num_experts": 0}, ["num_experts is 0", "at least 1"]),
        ({"num_experts": [4, 4]}, ["num_experts is [4, 4]", "4 of them", "has 2"]),
        ({"num_experts": []}, ["num_experts is []", "has 0"]),
        ({"moe_topk": 5}, ["moe_topk is 5", "num_experts (4)", "layer 0"]),
        ({"moe_topk": [1, 1, 1, 9]}, ["moe_topk is 9", "layer 3"]),
        ({"num_shared_expert": -1}, ["num_shared_expert is -1", "at least 0"]),
        ({"intermediate_size": [96, 96, 96, 0]}, ["intermediate_size is [96, 96, 96, 0]", "at least 1"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["type is 'yarn'", "default, linear, dynamic"]),
        ({"rope_scaling": {"type": "dynamic", "alpha": None}}, ["factor is None", "alpha"]),
        ({"rope_scaling": {"type": "dynamic", "alpha": -1}}, ["alpha is -1", "positive"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor is None", "at least 1", "'linear'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor is 0.5"]),
        ({"rope_scaling": [1000]}, ["rope_scaling is [1000]"]),
        ({"rope_theta": 0}, ["rope_theta"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        tiny_config(**fields)
    for word in words:
        assert word in str(raised.value)


def test_saving_checks_again(tmp_path: Path) -> None:
    config = tiny_config()
    config.moe_topk = 5
    with pytest.raises(ValueError, match="moe_topk is 5"):
        config.save_pretrained(tmp_path)


class TestAsVllmReadsIt:
    @pytest.fixture
    def read(self, tmp_path: Path) -> Any:
        config_module = pytest.importorskip("vllm.transformers_utils.config")
        register()

        def read(config: HunYuanConfig, **options: Any) -> HunYuanConfig:
            (tmp_path / "config.json").write_text(json.dumps(published_json(config)))
            return config_module.get_config(str(tmp_path), trust_remote_code=False, **options)

        return read

    @staticmethod
    def architecture(config: HunYuanConfig) -> Any:
        from hunyuan_vllm.arch_config import HunYuanArchConfigConvertor

        return HunYuanArchConfigConvertor(config, config).convert()

    @classmethod
    def max_model_len(cls, config: HunYuanConfig, asked: int | None = None) -> int:
        from vllm.config.model import _get_and_verify_max_len

        return _get_and_verify_max_len(config, cls.architecture(config), None, asked, False, None)

    def test_shape(self, read: Any) -> None:
        config = read(tiny_config(head_dim=48, moe_topk=2))
        assert isinstance(config, HunYuanConfig)
        seen = self.architecture(config)
        assert (seen.head_size, seen.total_num_kv_heads, seen.total_num_attention_heads) == (48, 2, 4)
        assert (seen.num_experts, seen.num_experts_per_token, seen.total_num_hidden_layers) == (4, 2, 4)

    def test_uniform_lists_read_as_their_value(self, read: Any) -> None:
        seen = self.architecture(read(tiny_config(num_experts=[4] * 4, moe_topk=[2] * 4)))
        assert (seen.num_experts, seen.num_experts_per_token) == (4, 2)

    @pytest.mark.parametrize("rope", [None, ALPHA_ROPE, {"type": "dynamic", "alpha": 1000.0, "factor": 4.0}])
    def test_maximum_length_is_the_files(self, read: Any, rope: dict[str, Any] | None) -> None:
        assert self.max_model_len(read(tiny_config(rope_scaling=rope))) == 512

    def test_v1_serves_its_documented_length_where_it_is_asked_for(self, read: Any) -> None:
        config = read(tiny_config(use_cla=False, model_type="hunyuan_v1_moe"))
        assert isinstance(config, HunYuanV1MoEConfig)
        assert config.longest_context == 262144
        assert (self.max_model_len(config), self.max_model_len(config, 262144)) == (512, 262144)
        with pytest.raises(ValueError, match="262145"):
            self.max_model_len(config, 262145)
        for other in ({"use_cla": True}, {"use_cla": False, "rope_scaling": {"type": "dynamic", "alpha": 50.0}}):
            with pytest.raises(ValueError, match="513"):
                self.max_model_len(read(tiny_config(**other)), 513)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 8.0}},
            {"model_max_length": 1024},
            {"seq_length": 128},
            {"use_cla": False, "model_type": "hunyuan_v1_dense", "num_experts": 1},
        ],
    )
    def test_the_longest_context_is_what_vllm_takes(self, read: Any, fields: dict[str, Any]) -> None:
        config = read(tiny_config(**fields))
        longest = Network.read(published_json(tiny_config(**fields))).longest_context
        assert self.max_model_len(config, longest) == longest
        with pytest.raises(ValueError, match=str(longest + 1)):
            self.max_model_len(config, longest + 1)

    def test_overrides_are_normalised_and_checked_too(self, read: Any) -> None:
        config = read(tiny_config(), hf_overrides_kw={"rope_theta": 5e5})
        assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 5e5, "alpha": 1000.0, "factor": 1.0}
        config = read(
            tiny_config(), hf_overrides_kw={"rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": None}}
        )
        assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 9.0, "factor": 1.0}
        with pytest.raises(ValueError, match="type is 'yarn'"):
            read(tiny_config(), hf_overrides_kw={"rope_scaling": {"type": "yarn", "factor": 2.0}})
