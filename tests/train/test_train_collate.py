"""Batches: padding changes nothing, and packed conversations do not see each other."""

from __future__ import annotations

import pytest
import torch
from checkpoints import tiny_config

from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.train.collate import pack_batch, pad_batch
from hunyuan_vllm.train.tokens import IGNORED, Example

PAD = 0


@pytest.fixture(scope="module")
def model() -> HunYuanForCausalLM:
    torch.manual_seed(0)
    return HunYuanForCausalLM(tiny_config(num_hidden_layers=2, initializer_range=0.2)).double().eval()


def example(length: int, seed: int) -> Example:
    ids = torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORED, *ids[1:]])


EXAMPLES = [example(length, seed) for seed, length in enumerate((5, 9, 1, 6))]


def test_padding() -> None:
    batch = pad_batch([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad_batch(EXAMPLES, PAD, multiple=8)["input_ids"].shape == (4, 16)


def test_packing() -> None:
    first, second = Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9])
    batch = pack_batch([[first, second], [second]], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, PAD, PAD, PAD]]
    # 8 is not predicted from 7, which is another conversation's.
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 9, IGNORED, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][:, 0].int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    ]


def loss_and_gradient(model: HunYuanForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Sum of the learned tokens' cross entropies, and the gradient of the shared K of the first pair of layers."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    return loss.item(), gradient.clone()


def test_padded_and_packed_batches_train_as_each_conversation_alone(model: HunYuanForCausalLM) -> None:
    """Nothing leaks between conversations, or from padding. Loss and router are computed in float32."""
    alone = [loss_and_gradient(model, pad_batch([one], PAD)) for one in EXAMPLES if len(one) > 1]
    loss, gradient = sum(one[0] for one in alone), sum(one[1] for one in alone)
    batches = {
        "padded": pad_batch(EXAMPLES, PAD),
        "one row": pack_batch([EXAMPLES], PAD),
        "two rows, filled up": pack_batch([EXAMPLES[:2], EXAMPLES[2:]], PAD, multiple=8),
    }
    for name, batch in batches.items():
        found = loss_and_gradient(model, batch)
        assert found[0] == pytest.approx(loss, rel=1e-6), name
        torch.testing.assert_close(found[1], gradient, atol=1e-5, rtol=1e-5, msg=name)
