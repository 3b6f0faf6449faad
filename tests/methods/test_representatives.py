"""Mean keys: what they are, which layers have them, and how they are compared and chosen."""

import pytest
import torch

from kvstrata.methods.representatives import (
    attachments,
    check_layers,
    chosen_layers,
    group_sum,
    mean_keys,
    parse_choice,
    scores,
    top_blocks,
)
from kvstrata.protos.errors import LimitError
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.representatives import ATTACHMENT, unpack_representatives

LAYERS, HEADS, BLOCKS, DIM, GROUP = 3, 2, 5, 8, 3


def _keys(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, HEADS, BLOCKS, BLOCK_TOKENS, DIM, generator=generator)


def test_the_representative_of_equal_keys_is_that_key() -> None:
    """R4 of papers.md, first half; of keys that float16 can hold, exactly."""
    key = torch.randn(LAYERS, HEADS, BLOCKS, 1, DIM).half().float()
    assert torch.equal(mean_keys(key.expand(-1, -1, -1, BLOCK_TOKENS, -1)), key[:, :, :, 0].half())


def test_summing_within_groups_gives_the_same_scores() -> None:
    """R4 of papers.md, second half: against one representative repeated for every query head."""
    means = mean_keys(_keys())[1].permute(1, 0, 2)
    query = torch.randn(HEADS * GROUP, DIM)
    summed = group_sum(query, HEADS)
    assert summed.shape == (HEADS, DIM)
    direct = means.float().flatten(1) @ summed.flatten()
    torch.testing.assert_close(scores(query, means), direct)


def test_cosine_is_that_of_the_repeated_representative() -> None:
    means = mean_keys(_keys())[0].permute(1, 0, 2)
    query = torch.randn(HEADS * GROUP, DIM)
    repeated = means.float().repeat_interleave(GROUP, dim=1).flatten(1)
    wanted = torch.nn.functional.cosine_similarity(repeated, query.flatten()[None], dim=1)
    torch.testing.assert_close(scores(query, means, cosine=True), wanted)
    assert scores(query, torch.zeros_like(means), cosine=True).tolist() == [0.0] * BLOCKS


def test_the_best_chunks_are_taken_whole_and_in_order() -> None:
    """R6 of papers.md: chunk means 3, 2 and 9; the fifth index does not exist."""
    assert top_blocks([1, 5, 2, 2, 9], top_k=4, chunk=2) == [0, 1, 4]


@pytest.mark.parametrize(
    ("block_scores", "top_k", "chunk", "chosen"),
    [
        ([1, 5, 2, 2, 9], 2, 1, [1, 4]),
        ([3, 3, 3], 2, 1, [0, 1]),
        ([1, None, 9, 9], 2, 2, [2, 3]),
        ([8, None, 1, 1], 2, 2, [0]),
        ([None, None, 1], 4, 2, [2]),
        ([1, 2], 8, 4, [0, 1]),
        ([1, 2], 0, 1, []),
        ([], 3, 1, []),
    ],
)
def test_ties_go_to_the_first_and_missing_blocks_count_for_nothing(
    block_scores: list[float | None], top_k: int, chunk: int, chosen: list[int]
) -> None:
    assert top_blocks(block_scores, top_k, chunk) == chosen


@pytest.mark.parametrize(
    ("text", "choice", "layers"),
    [
        ("", "", []),
        ("none", "", []),
        ("all", "all", [0, 1, 2, 3]),
        ("2", "2", [2]),
        (" 3, 1,3 ", "1,3", [1, 3]),
    ],
)
def test_a_choice_has_one_form(text: str, choice: str, layers: list[int]) -> None:
    assert parse_choice(text) == choice
    assert parse_choice(choice) == choice
    assert chosen_layers(choice, 4) == layers
    check_layers(choice, 4)


@pytest.mark.parametrize(
    "text", ["-1", "1,,2", "last", "1;2", "4096", "1e3", "9" * 5000, "²", "1\x004"]
)
def test_any_other_choice_is_refused(text: str) -> None:
    with pytest.raises(LimitError) as caught:
        parse_choice(text)
    assert caught.value.remedy
    assert len(caught.value.message) < 200


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(LimitError, match="no layer 4"):
        check_layers("1,4", 4)


def test_a_layer_whose_mean_is_no_float16_is_left_out_of_that_block() -> None:
    keys = _keys()
    keys[0, 1, 2, 7, 3] = torch.inf
    keys[2, 0, 4] = 1e6
    header = FrameHeader(num_kv_heads=HEADS, head_dim=DIM)
    means = mean_keys(keys)
    for block, data in enumerate(attachments(keys, [1, 4, 7])):
        frame = Frame.open(encode_frame(header, {0: b"x"}, {ATTACHMENT: data}))
        rows = unpack_representatives(frame)
        assert list(rows) == {2: [4, 7], 4: [1, 4]}.get(block, [1, 4, 7])
        for layer, row in rows.items():
            got = torch.frombuffer(bytearray(row), dtype=torch.float16).view(HEADS, DIM)
            assert torch.equal(got, means[(1, 4, 7).index(layer), :, block])
