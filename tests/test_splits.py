"""The rule by which GPU backends split keys."""

import pytest

from perceiver_kernels.splits import SLAB_BYTES, VARIABLE, backward_runs, forward_splits, parts


def test_split_rule_fills_the_device_and_no_more() -> None:
    assert parts(216, 256, 216, 5) == 1  # one full wave needs no split
    assert parts(64, 256, 216, 5) == 3  # 192 programs, one wave: 8 % more of it isn't worth seven more parts
    assert parts(8, 2048, 216, 1) == 27
    assert 128 <= parts(1, 8192, 132, 1) <= 132
    assert parts(1, 3, 132, 5) == 1  # three blocks are sooner done than merged
    assert parts(1, 12, 132, 1) == 12  # never more than there are blocks
    assert parts(5, 0, 132, 1) == 1
    for programs in (1, 3, 8, 64, 500):
        count = parts(programs, 1024, 132, 1)
        assert programs * count > 0.8 * 132 * -(-programs * count // 132), programs


def test_the_user_s_number_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forward_splits(64, 256, 216, 5) == 3
    monkeypatch.setenv(VARIABLE, "7")
    assert forward_splits(64, 256, 216, 5) == 7
    assert forward_splits(64, 4, 216, 5) == 4  # as far as there are blocks
    assert forward_splits(64, 0, 216, 5) == 1


def test_runs_of_the_backward_fill_the_device_within_the_room_for_slabs() -> None:
    assert backward_runs(8, 512, 216, 1 << 20) == 27
    assert backward_runs(64, 512, 216, 1 << 20) == 10
    assert backward_runs(64, 512, 216, SLAB_BYTES // 4) == 3  # four would fit, in two waves
    assert backward_runs(8, 512, 216, 2 * SLAB_BYTES) == 1
    assert backward_runs(8, 4, 216, 1 << 20) == 4
    assert backward_runs(8, 0, 216, 0) == 1
