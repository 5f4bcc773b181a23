"""The reference model against the original code's records, and what makes it trainable and loadable."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VARIANTS, random_tensors, rewrite, tiny_config, write_checkpoint
from golden_data import FLOAT32_TOLERANCE, GOLDEN_NAMES, Golden, load_golden, prompt_logprobs, reference_answers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from hunyuan_vllm import reference
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, expected_tensors
from hunyuan_vllm.reference import HunYuanForCausalLM, inverse_frequencies


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(path: Path, dtype: torch.dtype = torch.float32) -> HunYuanForCausalLM:
    return HunYuanForCausalLM.from_pretrained(path, dtype=dtype)


def random_model(tmp_path: Path, **overrides: Any) -> HunYuanForCausalLM:
    return load(write_checkpoint(tmp_path / "model", tiny_config(**overrides)))


def prompt_distances(model: HunYuanForCausalLM, golden: Golden) -> Tensor:
    """|Δ prompt_logprobs| of every prompt, in one row."""
    distances = [
        torch.tensor(prompt_logprobs(model, item.prompt)) - torch.tensor(item.prompt_logprobs) for item in golden.items
    ]
    return torch.cat(distances).abs()


def some_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


class TestGolden:
    @pytest.mark.parametrize("name", GOLDEN_NAMES)
    def test_float32(self, name: str) -> None:
        golden = load_golden(name)
        model = load(golden.path)
        assert prompt_distances(model, golden).max() <= FLOAT32_TOLERANCE
        for item in golden.items:
            for use_cache in (True, False):
                tokens, logprobs = model.greedy(torch.tensor([item.prompt]), 24, use_cache=use_cache)
                assert tokens[0].tolist() == item.greedy
                torch.testing.assert_close(
                    logprobs[0], torch.tensor(item.greedy_logprobs), rtol=0, atol=FLOAT32_TOLERANCE
                )

    @pytest.mark.parametrize("name", GOLDEN_NAMES)
    def test_bfloat16(self, name: str) -> None:
        golden = load_golden(name)
        assert prompt_distances(load(golden.path, torch.bfloat16), golden).mean() <= golden.bfloat16_tolerance


class TestMistakesShow:
    """Each plausible mistake, made on purpose, is far outside the golden tolerance."""

    VISIBLE = 1.0

    def test_owners_key_norm_in_cross_layers(self) -> None:
        golden = load_golden("cla2_top1")
        model = load(golden.path)
        layers = model.model.layers
        for owner, cross in zip(layers[::2], layers[1::2], strict=True):
            cross.self_attn.key_layernorm = owner.self_attn.key_layernorm
        assert prompt_distances(model, golden).max() > self.VISIBLE

    def test_norm_before_rope(self, monkeypatch: pytest.MonkeyPatch) -> None:
        golden = load_golden("cla2_top1")
        model = load(golden.path)
        angles: list[tuple[Tensor, Tensor]] = []
        rotate = reference.apply_rope

        def postpone(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            angles[:] = [(cos, sin)]
            return x

        class NormThenRope(nn.Module):
            def __init__(self, norm: nn.Module) -> None:
                super().__init__()
                self.norm = norm

            def forward(self, x: Tensor) -> Tensor:
                return rotate(self.norm(x), *angles[0])

        monkeypatch.setattr(reference, "apply_rope", postpone)
        for layer in model.model.layers:
            layer.self_attn.query_layernorm = NormThenRope(layer.self_attn.query_layernorm)
            layer.self_attn.key_layernorm = NormThenRope(layer.self_attn.key_layernorm)
        assert prompt_distances(model, golden).max() > self.VISIBLE

    @pytest.mark.parametrize(("name", "renormalise"), [("cla2_top1", True), ("cla2_top2", False)])
    def test_route_weights(self, name: str, renormalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def route(logits: Tensor, topk: int, right: bool) -> tuple[Tensor, Tensor]:
            assert right is not renormalise
            weights, ids = logits.softmax(-1).topk(topk)
            return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), ids

        golden = load_golden(name)
        monkeypatch.setattr(reference, "route", route)
        assert prompt_distances(load(golden.path), golden).max() > self.VISIBLE

    def test_router_in_bfloat16(self) -> None:
        golden = load_golden("cla2_top1")
        model = load(golden.path)
        for layer in model.model.layers:
            layer.mlp.gate.wg.weight.data = layer.mlp.gate.wg.weight.data.bfloat16().float()
        assert prompt_distances(model, golden).max() > FLOAT32_TOLERANCE

    def test_plain_rope_in_float32(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_checkpoint(tmp_path, tiny_config(rope_scaling=None))
        right = reference_answers(path, some_tokens(8, 160).tolist(), 1)

        def unrounded(config: HunYuanConfig, length: int) -> Tensor:
            return 1.0 / 10000.0 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)

        monkeypatch.setattr(reference, "inverse_frequencies", unrounded)
        assert prompt_distances(load(path), right).max() > self.VISIBLE


class TestRope:
    def test_plain_is_rounded_to_bfloat16(self) -> None:
        config = tiny_config(rope_scaling=None, head_dim=80)
        expected = torch.tensor([10000.0 ** -(j / 40) for j in range(40)], dtype=torch.float64)
        frequencies = inverse_frequencies(config, 1)
        assert torch.equal(frequencies, expected.float().bfloat16().float())
        assert frequencies.dtype == torch.float32

    def test_alpha_sets_the_base_whatever_the_length(self) -> None:
        config = tiny_config(head_dim=80)
        base = 10000.0 * 1000.0 ** (80 / 78)
        expected = torch.tensor([base ** -(j / 40) for j in range(40)])
        for length in (1, 512, 5000):
            torch.testing.assert_close(inverse_frequencies(config, length), expected, rtol=1e-5, atol=0)

    def test_dynamic_factor_grows_past_the_trained_length(self) -> None:
        config = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0})
        plain = torch.tensor([10000.0 ** -(j / 16) for j in range(16)])
        torch.testing.assert_close(inverse_frequencies(config, 512), plain)
        base = 10000.0 * (2.0 * 1024 / 512 - 1) ** (32 / 30)
        grown = torch.tensor([base ** -(j / 16) for j in range(16)])
        torch.testing.assert_close(inverse_frequencies(config, 1024), grown)

    def test_linear_divides_positions(self) -> None:
        linear = tiny_config(rope_scaling={"type": "linear", "factor": 4.0})
        cos, sin = reference.rotation(linear, torch.tensor([[6]]), 7, torch.float32)
        angles = torch.tensor([1.5 * 10000.0 ** -(j / 16) for j in range(16)]).repeat(2)
        torch.testing.assert_close(cos[0, 0, 0], angles.cos())
        torch.testing.assert_close(sin[0, 0, 0], angles.sin())


class TestGenerationAndBatches:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_cached_equals_uncached(self, variant: str, tmp_path: Path) -> None:
        model = random_model(tmp_path, **VARIANTS[variant])
        prompt = some_tokens(2, 30)
        tokens, logprobs = model.greedy(prompt, 12)
        tokens_again, logprobs_again = model.greedy(prompt, 12, use_cache=False)
        assert torch.equal(tokens, tokens_again)
        torch.testing.assert_close(logprobs, logprobs_again, rtol=0, atol=2e-4)

    def test_prefill_in_pieces(self, tmp_path: Path) -> None:
        model, tokens, cache = random_model(tmp_path), some_tokens(2, 100), DynamicCache()
        with torch.inference_mode():
            pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([7, 1, 80, 12], dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits, rtol=0, atol=2e-4)
        assert cache.get_seq_length() == 100

    def test_only_owners_hold_a_cache(self, tmp_path: Path) -> None:
        cache = DynamicCache()
        model = random_model(tmp_path, num_hidden_layers=5, cla_share_factor=3)
        with torch.inference_mode():
            model(some_tokens(1, 8), past_key_values=cache)
        assert [cache.get_seq_length(layer) for layer in range(len(cache))] == [8, 0, 0, 8]

    def test_stop_tokens(self, tmp_path: Path) -> None:
        model, prompt = random_model(tmp_path), some_tokens(1, 20)
        tokens = model.greedy(prompt, 12)[0][0].tolist()
        stop = tokens[5]
        assert model.greedy(prompt, 12, stop_ids=(stop,))[0][0].tolist() == tokens[: tokens.index(stop) + 1]

    def test_padding_changes_nothing(self, tmp_path: Path) -> None:
        """Left-padded prompts through transformers' own generate and cache."""
        model, prompt = random_model(tmp_path), some_tokens(2, 20)
        padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), prompt), dim=1)
        mask = (torch.arange(25) >= 5).long().expand(2, 25)
        options: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
        expected = model.greedy(prompt, 10)[0]
        assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 25:], expected)
        ones = torch.ones_like(prompt)
        assert torch.equal(model.generate(prompt, attention_mask=ones, **options)[:, 20:], expected)

    def test_right_padding_in_a_batch(self, tmp_path: Path) -> None:
        model, tokens = random_model(tmp_path), some_tokens(2, 30)
        mask = torch.ones_like(tokens)
        mask[1, 17:] = 0
        with torch.inference_mode():
            logits = model(tokens, attention_mask=mask).logits
            assert logits.isfinite().all()
            torch.testing.assert_close(logits[1, :17], model(tokens[1:, :17]).logits[0], rtol=0, atol=2e-4)

    def test_packed_sequences(self, tmp_path: Path) -> None:
        model, tokens = random_model(tmp_path), some_tokens(1, 30)
        document = (torch.arange(30) >= 12).long()
        mask = (document[:, None] == document).tril()[None, None]
        positions = torch.cat((torch.arange(12), torch.arange(18)))[None]
        with torch.inference_mode():
            packed = model(tokens, attention_mask=mask, position_ids=positions).logits
            apart = torch.cat((model(tokens[:, :12]).logits, model(tokens[:, 12:]).logits), dim=1)
        torch.testing.assert_close(packed, apart, rtol=0, atol=2e-4)


class TestTraining:
    @pytest.fixture
    def model(self, tmp_path: Path) -> HunYuanForCausalLM:
        return random_model(tmp_path, num_experts=8).train()

    @staticmethod
    def gradients(model: HunYuanForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def test_every_parameter_has_a_gradient(self, model: HunYuanForCausalLM) -> None:
        """Also those of experts that no token was routed to: three tokens cannot reach eight experts."""
        gradients = self.gradients(model, some_tokens(1, 3))
        assert gradients.keys() == model.state_dict().keys()
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    def test_cross_layers_train_their_owners_projections(self, model: HunYuanForCausalLM) -> None:
        """With the owner's own attention output cut, what reaches its k_proj and v_proj comes from the cross layer."""
        for layer in (0, 2):
            nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
        gradients = self.gradients(model, some_tokens(2, 20))
        for layer in (0, 2):
            for projection in ("k_proj", "v_proj"):
                assert gradients[f"model.layers.{layer}.self_attn.{projection}.weight"].abs().max() > 1e-4
        assert not gradients["model.layers.0.self_attn.q_proj.weight"].any()

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, model: HunYuanForCausalLM, use_reentrant: bool) -> None:
        tokens = some_tokens(2, 20)
        expected = self.gradients(model, tokens)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[3].self_attn.register_forward_hook(count)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        recomputed = self.gradients(model, tokens)
        assert calls == 2, "the layer was not recomputed"
        for name, gradient in expected.items():
            torch.testing.assert_close(recomputed[name], gradient)

    def test_it_learns(self) -> None:
        torch.manual_seed(0)
        model = HunYuanForCausalLM(tiny_config(tie_word_embeddings=True)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = some_tokens(2, 32)
        losses = []
        for _ in range(40):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 5 and losses[-1] < 0.1

    def test_router_logits_are_returned(self, model: HunYuanForCausalLM) -> None:
        logits = model(some_tokens(2, 5)).router_logits
        assert [tuple(layer.shape) for layer in logits] == [(10, 8)] * 4
        assert all(layer.requires_grad and layer.dtype == torch.float32 for layer in logits)

    def test_router_stays_float32(self, model: HunYuanForCausalLM) -> None:
        exact = model.model.layers[0].mlp.gate.wg.weight.detach().clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(some_tokens(1, 5)).router_logits[0].dtype == torch.float32
        cast = model.to(torch.bfloat16)
        assert torch.equal(cast.model.layers[0].mlp.gate.wg.weight, exact)
        assert cast.model.layers[0].mlp.experts[0].up_proj.weight.dtype == torch.bfloat16
        assert cast(some_tokens(1, 5)).logits.dtype == torch.bfloat16


class TestLayout:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_names_and_shapes_are_the_published_ones(self, variant: str) -> None:
        config = tiny_config(**VARIANTS[variant])
        ours = {name: tuple(tensor.shape) for name, tensor in random_tensors(config, 0)}
        assert ours == expected_tensors(config)

    @pytest.mark.parametrize("name", ["cla2_top1", "nocla_tied", "cla2_dense"])
    def test_saved_as_it_was_published(self, name: str, tmp_path: Path) -> None:
        golden = load_golden(name)
        load(golden.path, torch.bfloat16).save_pretrained(tmp_path)
        saved, published = load_file(tmp_path / "model.safetensors"), {}
        for shard in golden.path.glob("*.safetensors"):
            published |= load_file(shard)
        assert saved.keys() == published.keys()
        for tensor, original in published.items():
            assert saved[tensor].dtype == original.dtype
            assert torch.equal(saved[tensor], original), tensor
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["HunYuanForCausalLM"] and config["model_type"] == "hunyuan"
        assert prompt_distances(load(tmp_path), golden).max() <= FLOAT32_TOLERANCE

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("biases", [False, True])
    def test_fused_names_and_strays(self, tied: bool, biases: bool, tmp_path: Path) -> None:
        config = tiny_config(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
        plain = write_checkpoint(tmp_path / "plain", config)
        odd = write_checkpoint(tmp_path / "odd", config, fused=True, stray=True, shard_bytes=500_000)
        names = json.loads((odd / "model.safetensors.index.json").read_text())["weight_map"]
        assert "model.layers.0.self_attn.qkv_proj.weight" in names
        assert "model.layers.1.self_attn.q_proj.weight" in names
        assert "model.layers.3.mlp.experts.2.gate_and_up_proj.weight" in names
        assert "model.layers.2.self_attn.rotary_emb.inv_freq" in names
        assert "model.layers.2.mlp.shared_mlp.down_proj.bias" in names
        expected, loaded = load(plain).state_dict(), load(odd).state_dict()
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name

    def test_the_paths_name_and_generation_config_are_kept(self) -> None:
        golden = load_golden("cla2_dense")
        model = load(golden.path)
        assert model.name_or_path == model.config.name_or_path == str(golden.path)
        assert model.generation_config.eos_token_id == 2

    def test_other_arguments_reach_transformers(self) -> None:
        path = load_golden("cla2_dense").path
        model, info = HunYuanForCausalLM.from_pretrained(path, output_loading_info=True, initializer_range=0.5)
        assert model.dtype == torch.bfloat16 and model.config.initializer_range == 0.5
        assert not any(info.values())


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


class TestBrokenCheckpoints:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=2))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (drop("model.norm.weight"), ["lacks", "model.norm.weight"]),
            (drop("lm_head.weight"), ["lacks", "lm_head.weight"]),
            (drop("model.layers.0.self_attn.k_proj.weight"), ["lacks", "layers.0.self_attn.k_proj.weight"]),
            (drop("model.layers.1.mlp.experts.3.up_proj.weight"), ["lacks", "experts.3.up_proj.weight"]),
            (put("model.layers.1.self_attn.k_proj.weight", torch.ones(64, 128)), ["layers.1.self_attn.k_proj.weight"]),
            (put("model.layers.0.self_attn.rope.weight", torch.ones(3)), ["self_attn.rope.weight", "not part"]),
            (put("model.layers.2.input_layernorm.weight", torch.ones(128)), ["layers.2.input_layernorm", "not part"]),
            (put("model.norm.weight", torch.ones(127)), ["model.norm.weight", "[127]", "[128]"]),
            (put("model.norm.weight", torch.ones(0)), ["model.norm.weight", "[0]", "[128]"]),
            (put("model.layers.0.self_attn.qkv_proj.weight", torch.ones(256, 128)), ["_proj.weight", "also in"]),
            (
                put("model.layers.0.self_attn.q_proj.weight", torch.zeros(128, 128, dtype=torch.float8_e4m3fn)),
                ["q_proj.weight", "F8_E4M3", "quantization_config"],
            ),
        ],
    )
    def test_the_tensor_is_named(
        self, directory: Path, change: Callable[[dict[str, Tensor]], Any], words: list[str]
    ) -> None:
        rewrite(directory, change)
        with pytest.raises(CheckpointError) as raised:
            load(directory)
        for word in words:
            assert word in str(raised.value)

    def test_a_truncated_file_is_named(self, directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(directory)

    def test_a_shard_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        golden = shutil.copytree(load_golden("cla2_top1").path, tmp_path / "golden")
        (golden / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="model-00002-of-00002"):
            load(golden)

    def test_no_weights(self, directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
            load(directory)
