"""Rows to groups and back, and the permutation that a uid stands for."""

import subprocess
import sys
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_krpo.advantage.groups import group
from verl_krpo.config import Order


def all_counted(rows):
    return torch.ones(rows, dtype=torch.bool)


def members_of(groups):
    """{uid: rows in filter order}, read off the public arrays one member at a time."""
    found = {label: [] for label in groups.labels}
    for row, (line, place) in zip(groups.rows.tolist(), groups.mask.nonzero().tolist(), strict=True):
        label = groups.labels[line]
        assert len(found[label]) == place
        found[label].append(row)
    return found


labels = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40)


@given(labels, st.data())
def test_arrival_keeps_the_order_of_the_batch(index, data):
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index))))
    groups = group(np.array(index, dtype=object), counted)
    expected = {}
    for row, label in enumerate(index):
        if counted[row]:
            expected.setdefault(label, []).append(row)
    assert members_of(groups) == expected
    assert groups.sizes.tolist() == [len(rows) for rows in expected.values()]


@given(labels, st.sampled_from(Order))
def test_gather_and_scatter_are_inverse(index, order):
    groups = group(np.array(index, dtype=object), all_counted(len(index)), order)
    values = torch.arange(1.0, len(index) + 1)
    matrix = groups.gather(values)
    assert matrix.shape == (len(set(index)), max(index.count(label) for label in index))
    assert torch.equal(groups.scatter(matrix), values)
    assert (matrix[~groups.mask] == 0).all() and int(groups.mask.sum()) == len(index)


@given(labels)
def test_shuffled_is_a_permutation_within_each_group(index):
    array = np.array(index, dtype=object)
    shuffled, arrival = (members_of(group(array, all_counted(len(index)), order)) for order in Order)
    assert {k: sorted(v) for k, v in shuffled.items()} == arrival


@given(labels, labels, st.randoms())
def test_a_permutation_depends_on_the_uid_alone(index, others, random):
    """Whatever else is in the batch, and wherever: the arrival numbers of a group's members come in the same order."""

    def permutations(index):
        array, counted = np.array(index, dtype=object), all_counted(len(index))
        arrived, shuffled = (members_of(group(array, counted, order)) for order in (Order.arrival, Order.shuffled))
        return {label: [arrived[label].index(row) for row in shuffled[label]] for label in arrived}

    others = ["x" + label for label in others]
    mixed = index + others
    random.shuffle(mixed)
    alone, mixed = permutations(index), permutations(mixed)
    assert {label: mixed[label] for label in alone} == alone


def test_a_permutation_is_the_same_in_every_process():
    code = (
        "import numpy as np, torch\n"
        "from verl_krpo.advantage.groups import group\n"
        "from verl_krpo.config import Order\n"
        "index = np.array(['uid-%d' % (k % 3) for k in range(24)], dtype=object)\n"
        "print(group(index, torch.ones(24, dtype=torch.bool), Order.shuffled).rows.tolist())"
    )
    here = group(np.array([f"uid-{k % 3}" for k in range(24)], dtype=object), all_counted(24), Order.shuffled)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert there.stdout.strip().splitlines()[-1] == str(here.rows.tolist())
    # Written down once, so that a new version of this file cannot change it unnoticed.
    assert here.rows[:8].tolist() == [3, 12, 6, 18, 9, 0, 15, 21]


def test_every_member_takes_every_place_equally_often():
    size, prompts = 4, 4000
    uids = [str(uuid.UUID(int=k)) for k in range(prompts)]
    groups = group(np.repeat(np.array(uids, dtype=object), size), all_counted(size * prompts), Order.shuffled)
    member_at_place = (groups.rows % size).view(prompts, size).numpy()
    counts = np.stack([(member_at_place == member).sum(axis=0) for member in range(size)])
    # Binomial(4000, 1/4): standard deviation 27.
    assert np.abs(counts - prompts / size).max() < 4 * 27.4


def test_labels_may_be_strings_integers_or_tensors():
    rows = [[0, 2], [1, 3, 4]]
    for index in (
        np.array(["a", "b", "a", "b", "b"]),
        ["a", "b", "a", "b", "b"],
        np.array([7, 3, 7, 3, 3]),
        torch.tensor([7, 3, 7, 3, 3]),
        np.array([7, "3", 7, "3", "3"], dtype=object),
    ):
        assert list(members_of(group(index, all_counted(5))).values()) == rows
        assert [sorted(found) for found in members_of(group(index, all_counted(5), Order.shuffled)).values()] == rows


@pytest.mark.parametrize("order", Order)
def test_nothing_counted(order):
    groups = group(np.array(["a", "b"], dtype=object), torch.zeros(2, dtype=torch.bool), order)
    assert groups.gather(torch.ones(2)).shape == (0, 1)
    assert groups.scatter(torch.zeros(0, 1)).tolist() == [0, 0]


def test_a_missing_index_is_named():
    with pytest.raises(ValueError, match="index=None.*uid"):
        group(None, all_counted(2))
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 rows"):
        group(np.array(["a"], dtype=object), all_counted(2))
    with pytest.raises(ValueError, match=r"no prompt id .* rows \[1, 2\]"):
        group(np.array(["a", None, float("nan")], dtype=object), all_counted(3))


def test_a_row_that_is_not_counted_needs_no_id():
    groups = group(np.array(["a", None], dtype=object), torch.tensor([True, False]))
    assert members_of(groups) == {"a": [0]}
