import torch

from mnist_cnn.training.augmentation import draw_epoch, shift, soften, warp


def _dot(row: int, column: int) -> torch.Tensor:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, row, column] = 200
    return image


def test_a_shift_moves_the_ink_and_fills_with_paper() -> None:
    images = torch.cat([_dot(5, 6), _dot(0, 27), _dot(9, 9)])
    moved = shift(images, torch.tensor([[0, 2], [2, 0], [1, 1]]), 1)
    assert torch.equal(moved[0:1], _dot(6, 5))
    assert not moved[1].any()
    assert torch.equal(moved[2:3], _dot(9, 9))


def test_a_warp_of_nothing_changes_nothing() -> None:
    images = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    assert torch.equal(warp(images, torch.zeros(4, 4), 15, 0.2), images)


def test_a_warp_turns_about_the_middle() -> None:
    bar = torch.zeros(1, 28, 28, dtype=torch.uint8)
    bar[0, 4:24, 13:15] = 255
    turned = warp(bar, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 45, 0)
    assert turned[0, 13:15, 13:15].min() > 200
    rows, columns = turned[0].nonzero().unbind(1)
    assert columns.max() - columns.min() > 10
    assert abs(float(rows.float().mean()) - 13.5) < 0.5


def test_an_epoch_is_drawn_from_its_seed_and_number_alone() -> None:
    first, again = draw_epoch(100, 1, 3, 7), draw_epoch(100, 1, 3, 7)
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.shifts, again.shifts)
    assert torch.equal(first.warps, again.warps)
    assert not torch.equal(first.order, draw_epoch(100, 1, 3, 8).order)
    assert not torch.equal(first.order, draw_epoch(100, 1, 4, 7).order)
    assert sorted(first.order.tolist()) == list(range(100))
    assert set(first.shifts.unique(sorted=True).tolist()) == {0, 1, 2}


def test_one_of_so_many_images_is_blurred_and_the_others_stay() -> None:
    images = torch.zeros(9, 28, 28, dtype=torch.uint8)
    images[:, 14, 14] = 90
    softened = soften(images, 4)
    assert (softened[::4, 13:16, 13:16] == 10).all()
    assert (softened[::4].sum((1, 2)) == 90).all()
    sharp = [n for n in range(9) if n % 4]
    assert torch.equal(softened[sharp], images[sharp])
    assert images[0, 14, 14] == 90
    assert soften(images, 0) is images
