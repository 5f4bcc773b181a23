"""Pipeline cuts: what vLLM would cut, what a CLA network allows."""

from itertools import accumulate

import pytest
from checkpoints import tiny_config
from vllm.distributed.utils import get_pp_indices

from hunyuan_vllm.kv_cache import check_pipeline, even_partition, legal_partition


@pytest.mark.parametrize("layers", [4, 7, 10, 61, 64])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_even_partition_is_vllms(layers: int, stages: int) -> None:
    cuts = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    assert even_partition(layers, stages) == [end - start for start, end in cuts]


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [8, 9, 64])
@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_legal_partition_starts_on_owners(factor: int, layers: int, stages: int) -> None:
    config = tiny_config(num_hidden_layers=layers, cla_share_factor=factor)
    partition = legal_partition(config, stages)
    if partition is None:
        assert -(-layers // factor) < stages
        return
    assert sum(partition) == layers and min(partition) > 0
    assert not any(config.is_cross(start) for start in accumulate(partition[:-1]))


def test_the_message_names_layer_and_remedy() -> None:
    """64 layers on three ranks cut a group of two."""
    config = tiny_config(num_hidden_layers=64)
    with pytest.raises(
        ValueError, match="layer 21, a cross layer .* layer 20.* VLLM_PP_LAYER_PARTITION=22,22,20"
    ) as raised:
        check_pipeline(config, 3)
    partition = str(raised.value).rpartition("=")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PP_LAYER_PARTITION", partition)
        check_pipeline(config, 3)


def test_too_many_stages() -> None:
    with pytest.raises(ValueError, match="use at most 2 stages"):
        check_pipeline(tiny_config(num_hidden_layers=4), 4)


def test_a_users_partition_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,5")
    with pytest.raises(ValueError, match="layer 3"):
        check_pipeline(tiny_config(num_hidden_layers=8), 2)


def test_without_cla_any_cut_will_do() -> None:
    check_pipeline(tiny_config(num_hidden_layers=7, use_cla=False), 3)
