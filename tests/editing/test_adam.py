"""Adam is torch's Adam without ``.grad``; each tensor, and each view into one, has its own state."""

import pytest
import torch

from tl_factedit.editing.adam import Adam

SIZES = ((5, 7), (3,))


def gradients(step: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in SIZES]


@pytest.mark.parametrize("lr", [0.5, 1e-3])
def test_it_steps_as_torchs_adam_does(lr):
    ours = [torch.ones(size, dtype=torch.float64) for size in SIZES]
    theirs = [torch.ones(size, dtype=torch.float64, requires_grad=True) for size in SIZES]
    adam, reference = Adam(ours, lr), torch.optim.Adam(theirs, lr)
    for step in range(30):
        adam.step(gradients(step))
        for tensor, gradient in zip(theirs, gradients(step), strict=True):
            tensor.grad = gradient
        reference.step()
    assert adam.updates == 30
    for a, b in zip(ours, theirs, strict=True):
        assert (a - 1).abs().min() > 0
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)


def test_views_move_the_tensor_they_are_of_and_stop_one_by_one():
    whole = torch.zeros(2, 3)
    adams = [Adam([row], 0.1) for row in whole]
    for step in range(4):
        for i, adam in enumerate(adams):
            if step < 2 or i:
                adam.step([torch.full((3,), 1.0 + i)])
    # Adam's first steps are of size lr, whatever the gradient.
    torch.testing.assert_close(whole, torch.tensor([[-0.2] * 3, [-0.4] * 3]), rtol=1e-4, atol=1e-4)
    assert [adam.updates for adam in adams] == [2, 4]


def test_some_rows_go_on_as_they_would_have_among_all():
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 3, 4, generator=draw)
    whole, some = torch.zeros(3, 4), torch.zeros(3, 4)
    all_, fewer, rows = Adam([whole], 0.1), Adam([some], 0.1), torch.arange(3)
    for step, gradient in enumerate(gradients):
        if step == 3:
            rows = torch.tensor([2, 0])
            fewer = fewer.of(rows)
        all_.step([gradient])
        fewer.step([gradient[rows]])
    assert torch.equal(fewer.tensors[0], whole[rows]) and fewer.updates == all_.updates == 6
    assert not torch.equal(some[rows], whole[rows])  # a copy moved, not what was given


def test_a_gradient_for_each_tensor_is_needed():
    with pytest.raises(ValueError, match="shorter"):
        Adam([torch.zeros(2), torch.zeros(2)], 0.1).step([torch.zeros(2)])
