"""Convolutions over distinct patches equal convolutions over pictures, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtrl.nn import patches as module
from mtrl.nn.experts import ExpertCNN
from mtrl.nn.patches import codes, find_patches, one_hot_cells, pick, strides
from mtrl.nn.perception import GridCNN, View

PLANES = (5, 3, 2)


def _images(n: int = 40) -> Tensor:
    """Pictures [n, 3, 7, 6] of ids, many patches of which repeat."""
    generator = torch.Generator().manual_seed(0)
    few = [torch.randint(high, (n, 7, 6), generator=generator) for high in PLANES]
    image = torch.stack(few, 1).to(torch.uint8)
    image[:, :, :4] = 0
    return image


def test_cells_codes_and_strides_agree() -> None:
    cells = one_hot_cells(PLANES)
    assert cells.shape == (30, 10)
    assert torch.equal((cells * codes(PLANES)).sum(1), torch.arange(30).float())
    assert strides(PLANES).tolist() == [6, 2, 1]
    assert torch.equal(cells[1 * 6 + 2 * 2 + 1].nonzero()[:, 0], torch.tensor([1, 5 + 2, 8 + 1]))


def test_patches_spell_the_grid_they_came_from() -> None:
    cells = torch.tensor([[[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1]]]).expand(module.FEW, 3, 4)
    found = find_patches(cells, 2)
    assert found is not None
    first, second = found.parts
    assert {tuple(quad) for quad in first.tolist()} == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
    assert len(second) == 8, "two of them, and room"
    assert found.place.shape == (module.FEW, 1, 2)
    corners = first[second[found.place], 0]  # the upper left cells of the four quarters
    assert corners.tolist() == [[[[0, 1, 2, 3], [1, 0, 3, 2]]]] * module.FEW


def test_largest_ids_are_told_apart() -> None:
    top = module.MOST - 1
    cells = torch.tensor([[[top, top], [top, top]], [[top, top], [top, 0]], [[0, top], [top, top]]] * module.FEW)
    found = find_patches(cells, 1)
    assert found is not None
    assert torch.equal(found.parts[0][found.place].view(-1, 4), cells.view(-1, 4))


def test_more_patches_than_can_be_told_apart_are_left_alone() -> None:
    cells = torch.randint(module.MOST, (module.FEW, 60, 60), generator=torch.Generator().manual_seed(0))
    assert find_patches(cells, 1) is None


def test_few_grids_and_no_layers_are_left_alone() -> None:
    cells = torch.zeros(module.FEW, 3, 3, dtype=torch.int64)
    assert find_patches(cells, 1) is not None
    assert find_patches(cells[1:], 1) is None
    assert find_patches(cells, 0) is None


def test_pick_lays_rows_of_each_stack_side_by_side() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(pick(x, index), torch.stack([x[k][index].flatten(1) for k in range(2)]))
    assert torch.equal(pick(x[:1], index), x[0][index].flatten(1)[None])


@pytest.mark.parametrize("channels", [(4,), (4, 5, 6)])
def test_grid_cnn_equals_its_convolutions(channels: tuple[int, ...]) -> None:
    net = GridCNN((3, 7, 6), PLANES, channels).double()
    image = _images()
    found = net(image)
    ids = [F.one_hot(image[:, k].long(), p) for k, p in enumerate(PLANES)]
    plain = net.convs(torch.cat(ids, 3).double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1)
    expected = torch.tanh(plain)
    torch.testing.assert_close(found, expected)
    _same_gradients(found, expected, net)


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_over_ids_equal_their_convolutions(experts: int) -> None:
    plain = ExpertCNN(experts, View(0, (7, 6, 10)), (4, 5, 6)).double()
    fast = ExpertCNN(experts, View(0, (7, 6, 10), PLANES), (4, 5, 6)).double()
    fast.load_state_dict(plain.state_dict())
    latents = GridCNN((3, 7, 6), PLANES, ()).double()(_images())
    found, expected = fast(latents), plain(latents)
    assert found.shape == expected.shape == (experts, 40, fast.out)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((found * weight).sum(), list(fast.parameters()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(plain.parameters()))
    torch.testing.assert_close(mine, theirs)


def _same_gradients(found: Tensor, expected: Tensor, net: nn.Module) -> None:
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((found * weight).sum(), list(net.parameters()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(net.parameters()))
    torch.testing.assert_close(mine, theirs)
