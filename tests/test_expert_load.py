"""The load of experts, counted in the engine, is the routing of the independent model on the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import TRACED, engine, random_prompts
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from hunyuan_vllm import reference
from hunyuan_vllm.expert_load import EXTENSION, _Count

pytestmark = pytest.mark.engine


def loads_of_reference(directory: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens given to each expert, a row a layer in the order of layers."""
    counts: list[torch.Tensor] = []
    route = reference.route

    def counting(logits: torch.Tensor, topk: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(logits, topk, renormalize)
        counts.append(torch.bincount(ids.flatten(), minlength=logits.shape[-1]))
        return weights, ids

    monkeypatch.setattr(reference, "route", counting)
    model = reference.HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
    totals = []
    for prompt in prompts:
        counts.clear()
        with torch.inference_mode():
            model(torch.tensor([prompt]))
        totals.append(torch.stack(counts))
    return torch.stack(totals).sum(0).tolist()


@pytest.mark.parametrize(
    ("topk", "options"), [(1, {}), (2, {}), pytest.param(1, TRACED, marks=pytest.mark.slow)], ids=["1", "2", "traced"]
)
def test_counts_are_the_reference_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topk: int, options: dict) -> None:
    config = tiny_config(moe_topk=topk)
    directory = write_checkpoint(tmp_path / "checkpoint", config)
    prompts = random_prompts(config.vocab_size, [40, 23, 61])
    with engine(directory, worker_extension_cls=EXTENSION, **options) as llm:
        loads = loads_of_engine(llm, prompts)
    assert loads == loads_of_reference(directory, prompts, monkeypatch)
    assert sum(loads[0]) == topk * sum(map(len, prompts))
    assert len(loads) == config.num_hidden_layers


def loads_of_engine(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.collective_rpc("expert_load", args=(True,))
    llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
    (loads,) = llm.collective_rpc("expert_load")
    return [loads[layer] for layer in sorted(loads)]


def test_padding_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rows that fill a batch up, as to the size of a CUDA graph, nor the batches of an idle DP rank."""
    stock, sizes = CudagraphDispatcher.dispatch, []

    def dispatch_padded(self: CudagraphDispatcher, num_tokens: int, *args: Any, **options: Any) -> Any:
        sizes.append((num_tokens, -(-num_tokens // 64) * 64))
        return stock(self, sizes[-1][1], *args, **options)

    config = tiny_config()
    directory = write_checkpoint(tmp_path / "checkpoint", config)
    prompts = random_prompts(config.vocab_size, [40, 23])
    with engine(directory, worker_extension_cls=EXTENSION) as llm:
        monkeypatch.setattr(CudagraphDispatcher, "dispatch", dispatch_padded)
        loads = loads_of_engine(llm, prompts)
        llm.collective_rpc("execute_dummy_batch")
        (after,) = llm.collective_rpc("expert_load")
    assert any(padded > tokens for tokens, padded in sizes)
    assert loads == loads_of_reference(directory, prompts, monkeypatch)
    assert [after[layer] for layer in sorted(after)] == loads


def test_rows_without_an_expert_are_not_counted() -> None:
    """vLLM's routing kernels on GPUs give rows of padding no expert: -1, which is no index."""
    count = _Count(3)
    count(torch.tensor([[2, 0], [-1, -1], [2, 1]], dtype=torch.int32))
    assert count.tokens.tolist() == [1, 1, 2]


def test_nothing_is_counted_unless_asked_for(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with engine(directory) as llm:
        (captures,) = llm.apply_model(capture_functions)
    assert set(captures) == {None} and captures


def capture_functions(model: torch.nn.Module) -> list[object]:
    return [module.router.capture_fn for module in model.modules() if hasattr(module, "router")]
