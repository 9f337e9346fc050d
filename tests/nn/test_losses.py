from __future__ import annotations

import math

import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from mtrl.nn.losses import project, squashed_sample


def test_squashed_density_equals_the_change_of_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std, noise = (torch.randn(50, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    action, log_prob = squashed_sample(mean, log_std, noise)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * noise))
    inside = action.abs().max(1).values < 1 - 1e-9  # beyond, the reference's atanh loses its digits
    assert inside.sum() > 30
    torch.testing.assert_close(log_prob[inside], reference.log_prob(action).sum(1)[inside], rtol=1e-6, atol=1e-6)


def test_squashed_density_integrates_to_one() -> None:
    action = torch.linspace(-1 + 1e-7, 1 - 1e-7, 400_001, dtype=torch.float64)
    mean, log_std = torch.full((len(action), 1), 0.3).double(), torch.full((len(action), 1), math.log(0.7)).double()
    noise = (torch.atanh(action)[:, None] - mean) / log_std.exp()
    density = squashed_sample(mean, log_std, noise)[1].exp()
    assert abs(float(torch.trapezoid(density, action)) - 1) < 1e-4


def test_squashed_density_is_finite_where_tanh_saturates() -> None:
    mean = torch.tensor([[40.0, -40.0]], requires_grad=True)
    action, log_prob = squashed_sample(mean, torch.zeros(1, 2), torch.ones(1, 2))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert mean.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert float(action.abs().detach().max()) <= 1


def test_projection_splits_between_neighbours() -> None:
    support = torch.linspace(-10, 10, 101)  # spacing 0.2
    out = project(torch.ones(1, 1), torch.tensor([[0.1]]), support)
    torch.testing.assert_close(out[0, 50:52], torch.tensor([0.5, 0.5]), rtol=0, atol=1e-4)
    assert float(out.sum()) == 1


def test_what_is_not_a_number_stays_so() -> None:
    out = project(torch.ones(2, 1), torch.tensor([[torch.nan], [0.0]]), torch.linspace(-1, 1, 3))
    assert torch.isnan(out[0]).any()
    assert out[1].tolist() == [0, 1, 0]


def test_projection_of_the_support_onto_itself_changes_nothing() -> None:
    support = torch.linspace(-2, 2, 9, dtype=torch.float64)
    probs = torch.rand(5, 9, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(project(probs, support.expand(5, 9), support), probs)


def test_projection_keeps_mass_and_mean_and_clips_at_the_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.linspace(-10, 10, 101, dtype=torch.float64)
    probs = torch.rand(64, 101, generator=generator, dtype=torch.float64).softmax(1)
    atoms = torch.rand(64, 101, generator=generator, dtype=torch.float64) * 19.9 - 9.95
    out = project(probs, atoms, support)
    torch.testing.assert_close(out.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(out @ support, (probs * atoms).sum(1))
    assert float(out.min()) >= 0
    far = project(torch.tensor([[0.25, 0.75]]), torch.tensor([[-50.0, 99.0]]), torch.linspace(-10, 10, 101))
    assert float(far[0, 0]) == 0.25
    assert float(far[0, -1]) == 0.75
