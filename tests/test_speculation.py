"""Speculative decoding, by an EAGLE-3 draft and by n-grams of the prompt: it changes no greedy answer."""

import json
from pathlib import Path

import pytest
import torch
from engine import counter, engine, greatest_difference, score
from golden_data import FLOAT32_TOLERANCE, load_golden
from safetensors.torch import save_file
from vllm.model_executor.models.interfaces import supports_eagle3

from hunyuan_vllm.model import HunYuanForCausalLM, HunYuanModel


def write_draft(directory: Path, hidden: int, vocab: int) -> Path:
    """A random draft of one Llama layer, in the layout that AngelSlim publishes for Hunyuan models: its heads are the
    target's (vLLM cannot group the caches of others with shared ones)."""
    directory.mkdir()
    width, kept, heads, kv_heads, head_dim = 2 * hidden, vocab // 2, 4, 2, 32
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "draft_vocab_size": kept,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(fields))
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * hidden),
        **{f"midlayer.self_attn.{part}_proj.weight": (kv, 2 * hidden) for part in "kv"},
        "midlayer.self_attn.o_proj.weight": (hidden, q),
        "midlayer.mlp.gate_proj.weight": (width, hidden),
        "midlayer.mlp.up_proj.weight": (width, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, width),
        "norm.weight": (hidden,),
        "lm_head.weight": (kept, hidden),
        "embed_tokens.weight": (vocab, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    tensors["d2t"] = torch.arange(kept)  # the draft's token n is the target's 2n
    tensors["t2d"] = torch.arange(vocab) % 2 == 0
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_interface() -> None:
    assert supports_eagle3(HunYuanForCausalLM)
    assert HunYuanModel.supports_aux_hidden_states_over_pp


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1_1_8b", "cla4_top1"])
def test_a_random_draft_changes_no_answer(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    config = json.loads((golden.path / "config.json").read_text())
    draft = write_draft(tmp_path / "draft-eagle3", config["hidden_size"], config["vocab_size"])
    speculation = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    with engine(golden.path, speculative_config=speculation) as llm:
        results = score(llm, [item.prompt for item in golden.items], max_tokens=24, prompt_logprobs=False)
    assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1_7b", "cla2_top1"])
def test_ngrams_change_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's own process: where numba is imported, vLLM cannot make a second engine."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    golden = load_golden(name)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(golden.path, speculative_config=speculation) as llm:
        results = score(llm, [item.prompt for item in golden.items], max_tokens=24, prompt_logprobs=False)
        assert counter(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE
