"""Parts of the example on which comparing two runs depends: data, sizes, digest."""

from __future__ import annotations

import pytest
import torch
import train_gpt

TINY = train_gpt.Size(layers=1, heads=2, width=16, context=32, batch=3)


def test_ranks_share_the_windows_of_one_process() -> None:
    """Two ranks with half the batch see together what one process sees."""
    whole = train_gpt.StandardLibrary(train_gpt.Size(1, 2, 16, 32, batch=6), 0, 1, seed=3)
    halves = [train_gpt.StandardLibrary(TINY, rank, 2, seed=3) for rank in range(2)]
    for _ in range(3):
        inputs, targets = whole.next_batch()
        parts = [half.next_batch() for half in halves]
        assert torch.equal(inputs, torch.cat([part[0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[1] for part in parts]))


def test_data_goes_on_where_its_state_says() -> None:
    first = train_gpt.StandardLibrary(TINY, 0, 1, seed=3)
    for _ in range(4):
        first.next_batch()
    second = train_gpt.StandardLibrary(TINY, 0, 1, seed=3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.next_batch()[0], second.next_batch()[0])


def test_a_pass_over_the_data_uses_every_window_once() -> None:
    data = train_gpt.StandardLibrary(TINY, 0, 1, seed=3)
    assert data._order(0).sort().values.tolist() == list(range(data.windows))
    assert not torch.equal(data._order(0), data._order(1))


@pytest.mark.parametrize("name", train_gpt.SIZES)
def test_sizes_are_called_by_their_parameters(name: str) -> None:
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.SIZES[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(int(name.removesuffix("M")) * 1e6, rel=0.1)


def test_the_digest_depends_on_names_values_and_dtype() -> None:
    zeros = torch.zeros(4)
    digests = {
        train_gpt.digest(tensors)
        for tensors in (
            {"first": zeros},
            {"second": zeros},
            {"first": zeros + 1},
            {"first": zeros.to(torch.int32)},
            {"first": zeros.view(2, 2)},
        )
    }
    assert len(digests) == 5
    assert train_gpt.digest({"x": zeros, "y": zeros + 1}) == train_gpt.digest({"y": zeros + 1, "x": zeros})
