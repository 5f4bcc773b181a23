"""The mathematics of training: gradients against finite differences in float64, and against a naive network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import random_tensors, tiny_config
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.train.collate import pack_batch, pad_batch
from hunyuan_vllm.train.model import train_attention_only
from hunyuan_vllm.train.moe_balance import ExpertLoad, balance_loss
from hunyuan_vllm.train.tokens import Example
from hunyuan_vllm.train.trainer import without_padding_mask

SMALL: dict[str, Any] = dict(vocab_size=61, hidden_size=32, intermediate_size=24, num_experts=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "top-1": {},
    "top-2": dict(moe_topk=2),
    "three layers share": dict(num_hidden_layers=3, cla_share_factor=3),
    "tied, no norms": dict(tie_word_embeddings=True, use_qk_norm=False),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact_model(**overrides: Any) -> HunYuanForCausalLM:
    """A small random network in float64, all through."""
    config = tiny_config(**(SMALL | overrides))
    model = HunYuanForCausalLM(config)
    model.load_state_dict(dict(random_tensors(config, seed=1)), strict=False)
    model.tie_weights()
    return model.double().train()


def some_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model: HunYuanForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    cross_entropy(model(tokens).logits, tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Naive:
    """The network token by token and expert by expert, from the definition, on the same weights."""

    def __init__(self, weights: dict[str, Tensor], config: HunYuanConfig) -> None:
        self.w, self.config = weights, config

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.w[name]

    def rope(self, heads: Tensor) -> Tensor:
        """[tokens, heads, head_dim]: each pair is turned, as complex numbers are."""
        d, half = self.config.head_dim, self.config.head_dim // 2
        rope = self.config.rope_parameters
        base = rope["rope_theta"] * rope["alpha"] ** (d / (d - 2))
        frequencies = (1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)).float()
        angles = torch.arange(len(heads), dtype=torch.float32)[:, None] * frequencies
        turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
        turned = torch.complex(heads[..., :half], heads[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def moe(self, x: Tensor, name: str) -> Tensor:
        rows = []
        for token in x:
            probabilities = (token @ self.w[f"{name}.gate.wg.weight"].T).softmax(-1)
            values, ids = probabilities.topk(self.config.moe_topk)
            if self.config.moe_topk > 1:
                values = values / values.sum()
            chosen = [v * self.mlp(token, f"{name}.experts.{e}") for v, e in zip(values, ids.tolist(), strict=True)]
            rows.append(self.mlp(token, f"{name}.shared_mlp") + sum(chosen))
        return torch.stack(rows)

    def attention(self, x: Tensor, layer: int, kv: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        config, name, d = self.config, f"model.layers.{layer}.self_attn", self.config.head_dim
        q = self.rope(self.linear(x, f"{name}.q_proj").view(len(x), -1, d))
        owner = layer - layer % config.cla_share_factor
        if layer == owner:
            k = self.rope(self.linear(x, f"{name}.k_proj").view(len(x), -1, d))
            kv[layer] = k, self.linear(x, f"{name}.v_proj").view(len(x), -1, d)
        k, v = kv[owner]
        if config.use_qk_norm:
            q = self.norm(q, f"{name}.query_layernorm.weight")
            k = self.norm(k, f"{name}.key_layernorm.weight")
        group = config.num_attention_heads // config.num_key_value_heads
        out = torch.stack(
            [
                torch.cat(
                    [
                        (q[t, h] @ k[: t + 1, h // group].T * d**-0.5).softmax(-1) @ v[: t + 1, h // group]
                        for h in range(config.num_attention_heads)
                    ]
                )
                for t in range(len(x))
            ]
        )
        return self.linear(out, f"{name}.o_proj")

    def logits(self, ids: Tensor) -> Tensor:
        x, kv = self.w["model.embed_tokens.weight"][ids], {}
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm.weight"), layer, kv)
            x = x + self.moe(self.norm(x, f"{name}.post_attention_layernorm.weight"), f"{name}.mlp")
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(self.norm(x, "model.norm.weight"), head)


class TestGradients:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_all_equal_a_naive_networks(self, variant: str) -> None:
        model, tokens = exact_model(**VARIANTS[variant]), some_tokens()
        ours = gradients(model, tokens)
        weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
        naive = Naive(weights, model.config)
        cross_entropy(torch.stack([naive.logits(row) for row in tokens]), tokens).backward()
        for name, gradient in ours.items():
            expected = weights[name].grad
            if expected is None:  # an expert that no token was given
                assert ".experts." in name and not gradient.any()
                continue
            torch.testing.assert_close(
                gradient, expected, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )

    def test_they_equal_finite_differences(self) -> None:
        """Of K and V, which cross layers share; of the router by the raw probability of the one expert; of norms."""
        model, tokens = exact_model(), some_tokens()
        ours = gradients(model, tokens)
        parameters = dict(model.named_parameters())
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 2) for part in "kv"]
        names += [f"model.layers.{layer}.mlp.gate.wg.weight" for layer in range(4)]
        names += ["model.layers.1.self_attn.key_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"]
        generator = torch.Generator().manual_seed(0)
        for name in names:
            direction = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
            exact = (ours[name] * direction).sum().item()
            measured = self.slope(model, parameters[name], direction, tokens)
            assert abs(measured - exact) <= 1e-6 * abs(exact) + 1e-9, name
            assert abs(exact) > 1e-4, f"{name}: nothing flows"

    @torch.no_grad()
    def slope(self, model: HunYuanForCausalLM, parameter: Tensor, direction: Tensor, tokens: Tensor) -> float:
        before, step, sides = parameter.clone(), 1e-5, []
        for factor in (1, -1):
            parameter.copy_(before + factor * step * direction)
            sides.append(cross_entropy(model(tokens).logits, tokens).item())
        parameter.copy_(before)
        return (sides[0] - sides[1]) / (2 * step)

    def test_a_cross_layers_share_reaches_its_owner(self) -> None:
        """What an owner's k_proj and v_proj get is the sum over the layers that read them, none of them nothing."""
        model, tokens = exact_model(), some_tokens()
        whole = gradients(model, tokens)
        handles = [model.model.layers[1].register_forward_pre_hook(self.cut, with_kwargs=True)]
        alone = gradients(model, tokens)
        handles[0].remove()
        for part in "kv":
            name = f"model.layers.0.self_attn.{part}_proj.weight"
            from_cross = whole[name] - alone[name]
            assert from_cross.norm() > 0.05 * whole[name].norm()

    @staticmethod
    def cut(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, k, v, *rest = positional
        return (x, k.detach(), v.detach(), *rest), named

    def test_checkpointing_changes_nothing(self) -> None:
        for dropped in ({}, dict(moe_topk=2)):
            model, tokens = exact_model(**dropped), some_tokens()
            plain = gradients(model, tokens)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for name, gradient in gradients(model, tokens).items():
                assert torch.equal(gradient, plain[name]), name


class TestRouter:
    def test_it_computes_in_float32_whatever_the_rest_does(self) -> None:
        config = tiny_config(**SMALL)
        model = HunYuanForCausalLM(config).to(torch.bfloat16).train()
        gate = model.model.layers[0].mlp.gate
        exact = torch.randn(4, 32)
        gate.wg.weight.data = exact.clone()
        x = torch.randn(5, 32, dtype=torch.bfloat16)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = gate(x)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, x.float() @ exact.T, rtol=1e-6, atol=1e-6)
        model(some_tokens(), labels=some_tokens()).loss.backward()
        assert gate.wg.weight.grad is not None and gate.wg.weight.grad.dtype == torch.float32
        assert model.model.layers[0].self_attn.k_proj.weight.grad.dtype == torch.bfloat16


class TestBalance:
    LOGITS = [torch.randn(40, 4, generator=torch.Generator().manual_seed(n)).double() * 2 for n in range(2)]

    @pytest.mark.parametrize("topk", [1, 2])
    def test_the_loss_is_the_formulas(self, topk: int) -> None:
        real = torch.arange(40) < 33
        expected = []
        for logits in self.LOGITS:
            given, likely = [0.0] * 4, [0.0] * 4
            for token in range(33):
                probabilities = logits[token].softmax(-1)
                for expert in probabilities.topk(topk).indices.tolist():
                    given[expert] += 1 / (33 * topk)
                for expert in range(4):
                    likely[expert] += probabilities[expert].item() / 33
            expected.append(4 * sum(f * p for f, p in zip(given, likely, strict=True)))
        ours = balance_loss(self.LOGITS, [topk, topk], real)
        assert ours.item() == pytest.approx(sum(expected) / 2, rel=1e-12)

    def test_its_gradient_is_of_the_probabilities_alone(self) -> None:
        logits = self.LOGITS[0].clone().requires_grad_()
        balance_loss([logits], [1]).backward()
        again = self.LOGITS[0].clone().requires_grad_()
        share = F.one_hot(again.argmax(-1), 4).double().mean(0)
        (4 * (share * again.softmax(-1).mean(0)).sum()).backward()
        torch.testing.assert_close(logits.grad, again.grad)

    def test_even_is_one_and_one_expert_for_all_is_their_number(self) -> None:
        even = torch.eye(4, dtype=torch.float64).repeat(5, 1) * 1e-9
        assert balance_loss([even], [1]).item() == pytest.approx(1)
        assert balance_loss([torch.tensor([[50.0, 0, 0, 0]] * 8)], [1]).item() == pytest.approx(4)

    def test_the_load_counts_tokens_that_are_no_padding(self) -> None:
        config = tiny_config(num_experts=[4, 1, 3, 1], moe_topk=[1, 1, 2, 1], num_hidden_layers=4)
        load = ExpertLoad(config)
        first = torch.eye(4)[[0, 0, 1, 3, 2]]
        third = torch.tensor([[3.0, 2, 1]] * 5)
        for _ in range(2):
            load.add([first, third], torch.tensor([True, True, True, True, False]))
        assert load.take_max() == 0.5
        assert load.take_max() is None


class TestRows:
    def examples(self) -> list[Example]:
        rows = [some_tokens(1, length, seed=length)[0].tolist() for length in (9, 5, 7, 3)]
        return [Example(row, [-100, -100, *row[2:]]) for row in rows]

    def loss(self, model: HunYuanForCausalLM, batch: dict[str, Tensor]) -> Tensor:
        """The sum over the learned tokens."""
        labels = batch["labels"]
        inputs, _ = without_padding_mask(batch)
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    def test_packed_padded_and_single_rows_have_the_same_loss_and_gradients(self) -> None:
        model, examples = exact_model(), self.examples()
        found = []
        for batches in (
            [pad_batch([one], 0) for one in examples],
            [pad_batch(examples, 0, multiple=4)],
            [pack_batch([examples[:3], examples[3:]], 0, multiple=8)],
        ):
            model.zero_grad()
            loss = torch.stack([self.loss(model, batch) for batch in batches]).sum()
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        for loss, grads in found[1:]:
            torch.testing.assert_close(loss, found[0][0], rtol=1e-10, atol=0)
            for name, gradient in grads.items():
                torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-7, atol=1e-9)

    def test_padding_is_known_in_both_kinds_of_rows(self) -> None:
        examples = self.examples()
        for batch in (pad_batch(examples, 0), pack_batch([examples[:2], examples[2:]], 0)):
            _, real = without_padding_mask(batch)
            assert real is not None and int(real.sum()) == 24
        assert "attention_mask" not in without_padding_mask(pad_batch(examples, 0))[0]


def test_only_attention_is_trained_where_that_is_asked_for() -> None:
    model = HunYuanForCausalLM(tiny_config(**SMALL))
    train_attention_only(model)
    trained = {name.split(".", 3)[3] for name, p in model.named_parameters() if p.requires_grad}
    parts = [f"{part}_proj" for part in "qkvo"] + ["query_layernorm", "key_layernorm"]
    assert trained == {f"self_attn.{part}.weight" for part in parts}
