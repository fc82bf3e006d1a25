from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.objectives.memory_bank import MemoryBank


def cosine(left: Tensor, right: Tensor) -> float:
    return float(functional.cosine_similarity(left, right, dim=0))


class PlainBank:
    """The rule, one sketch after the other, with lists."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[int, list[Tensor]] = {}

    def add(
        self, sketches: Tensor, sketch_labels: list[int], photos: Tensor, photo_labels: list[int]
    ) -> None:
        for sketch, label in zip(sketches, sketch_labels, strict=True):
            kept = self.kept.setdefault(label, [])
            if len(kept) < self.size:
                kept.append(sketch)
                continue
            mine = [p for p, other in zip(photos, photo_labels, strict=True) if other == label]
            if not mine:
                continue
            middle = torch.stack(mine).mean(0)
            scores = [cosine(entry, middle) for entry in kept]
            if cosine(sketch, middle) > min(scores):
                kept[scores.index(min(scores))] = sketch

    def loss(self, photos: Tensor, labels: list[int]) -> float:
        cosines = [
            cosine(photo, torch.stack(self.kept[label]).mean(0))
            for photo, label in zip(photos, labels, strict=True)
            if self.kept.get(label)
        ]
        return 1 - sum(cosines) / len(cosines) if cosines else 0.0


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(9, 5, generator=draw) + 0.5,
            torch.randint(0, 4, (9,), generator=draw),
            torch.randn(6, 5, generator=draw) + 0.5,
            torch.randint(0, 5, (6,), generator=draw),
        )
        for _ in range(count)
    ]


def test_entries_and_loss_equal_a_plain_loop_over_many_batches() -> None:
    bank, plain = MemoryBank(5, 3, 5), PlainBank(3)
    replaced = 0
    for sketches, sketch_labels, photos, photo_labels in batches(12):
        before = [bank.entries(label).clone() for label in range(5)]
        bank.add(sketches, sketch_labels, photos, photo_labels)
        plain.add(sketches, sketch_labels.tolist(), photos, photo_labels.tolist())
        for label in range(5):
            kept = plain.kept.get(label, [])
            expected = torch.stack(kept) if kept else torch.zeros(0, 5)
            torch.testing.assert_close(bank.entries(label), expected)
            is_full = len(before[label]) == 3
            replaced += is_full and not torch.equal(before[label], bank.entries(label))
        found = float(bank.loss(photos, photo_labels))
        assert found == pytest.approx(plain.loss(photos, photo_labels.tolist()), abs=1e-5)
    assert bank.counts == (3, 3, 3, 3, 0)
    assert replaced > 5


def full_bank() -> MemoryBank:
    """Class 0 holds the directions east and north, class 1 holds two of its own."""
    bank = MemoryBank(2, 2, 2)
    east_north = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bank.add(
        torch.cat([east_north, -east_north]),
        torch.tensor([0, 0, 1, 1]),
        torch.zeros(0, 2),
        torch.zeros(0, dtype=torch.int64),
    )
    return bank


def test_the_farthest_entry_of_the_class_itself_is_replaced() -> None:
    bank = full_bank()
    other = bank.entries(1).clone()
    # The class's photos look north-north-east; east (1, 0) is the farther of the two entries.
    photos = torch.tensor([[1.0, 3.0], [1.0, 5.0]])
    sketch = torch.tensor([[2.0, 3.0]])
    bank.add(sketch, torch.tensor([0]), photos, torch.tensor([0, 0]))
    torch.testing.assert_close(bank.entries(0), torch.tensor([[2.0, 3.0], [0.0, 1.0]]))
    # The released code's mistake: slot 0 taken for class 0, all of whose entries it overwrote.
    torch.testing.assert_close(bank.entries(1), other)


def test_nothing_is_replaced_by_a_farther_sketch_or_without_photos_of_the_class() -> None:
    for sketch, photo_label in (([-1.0, 0.0], 0), ([2.0, 3.0], 1)):
        bank = full_bank()
        before = bank.entries(0).clone()
        photos = torch.tensor([[1.0, 3.0]])
        bank.add(torch.tensor([sketch]), torch.tensor([0]), photos, torch.tensor([photo_label]))
        torch.testing.assert_close(bank.entries(0), before)


def test_the_papers_loss_moves_photos_and_the_released_one_moves_nothing() -> None:
    bank = full_bank()
    photos = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    loss = bank.loss(photos, labels)
    # Prototypes (1, 1)/2 and (-1, -1)/2: both cosines are cos 45 degrees.
    assert float(loss.detach()) == pytest.approx(1 - 0.5**0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert photos.grad is not None
    # A step against the gradient turns each photo to its prototype.
    assert photos.grad[0, 1] < 0 < photos.grad[1, 1]
    released = bank.loss(photos, labels, with_gradient=False)
    assert float(released) == float(loss.detach())
    assert not released.requires_grad


def test_kept_sketches_carry_no_gradient() -> None:
    bank = MemoryBank(1, 2, 2)
    sketches = torch.tensor([[1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    bank.add(sketches, label, sketches, label)
    assert not bank.entries(0).requires_grad


def test_photos_of_classes_without_entries_are_left_out() -> None:
    bank = MemoryBank(3, 2, 2)
    photos = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    nothing = bank.loss(photos, torch.tensor([0, 1]))
    assert float(nothing.detach()) == 0.0
    nothing.backward()  # type: ignore[no-untyped-call]
    bank.add(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), photos[:0], torch.tensor([]).long())
    assert float(bank.loss(photos, torch.tensor([0, 1])).detach()) == pytest.approx(0.0)
    assert float(bank.loss(photos, torch.tensor([1, 0])).detach()) == pytest.approx(1.0)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_bank_was_not_made_for_is_refused(label: int) -> None:
    bank = MemoryBank(3, 2, 2)
    good, bad, rows = torch.tensor([0]), torch.tensor([label]), torch.ones(1, 2)
    for call in (
        lambda: bank.add(rows, bad, rows, good),
        lambda: bank.add(rows, good, rows, bad),
        lambda: bank.loss(rows, bad),
    ):
        with pytest.raises(BadData, match=rf"class number {label} in a memory bank of 3 classes"):
            call()
    assert bank.counts == (0, 0, 0)


def test_the_bank_is_saved_restored_and_forgotten() -> None:
    bank = full_bank()
    state = bank.state()
    restored = MemoryBank(2, 2, 2)
    restored.load_state(state)
    bank.forget()
    assert bank.counts == (0, 0)
    photos, labels = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 1])
    assert float(bank.loss(photos, labels)) == 0.0
    assert restored.counts == (2, 2)
    assert float(restored.loss(photos, labels)) == float(full_bank().loss(photos, labels))
    with pytest.raises(BadConfig, match=r"\(2, 2, 2\)(.|\n)*\(3, 2, 2\)"):
        MemoryBank(3, 2, 2).load_state(state)
    with pytest.raises(BadConfig, match="memory bank"):
        MemoryBank(2, 2, 2).load_state({})
