"""On a GPU: the same networks, gradients and contract as on the CPU, and the same bits in every run.

Skipped where torch finds none. ``MTRL_TEST_DEVICE=cpu`` runs what needs no GPU on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import mtrl
from mtrl import registry, runs
from mtrl.config import RunConfig, parse_config
from mtrl.nn.aggregation import Aggregator, Method
from mtrl.nn.balancers import BalancerName
from mtrl.nn.cuda_graph import WARM, Graphed
from mtrl.nn.heads import TaskMLP, TaskRows
from mtrl.nn.linear import Route
from mtrl.nn.orthogonal import orthonormal_mixture
from mtrl.nn.trunk import TrunkConfig, make_trunk
from mtrl.nn.trunk.config import Kind
from mtrl.testing import check_agent
from mtrl.testing.agent_check import GROUPS
from mtrl.train import train
from mtrl_agents.sac import SAC as SoftActorCritic
from tests.ragged import RAGGED_LAYOUT, ragged_run, ragged_spec
from tests.sameness import assert_same_run, rewind
from tests.trunks import small

DEVICE = os.environ.get("MTRL_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")

TRUNKS = {kind: TrunkConfig(**small(kind, 32, 16)) for kind in get_args(Kind)}
PPO: dict[str, Any] = {"kind": "ppo", "rollout": 50, "epochs": 2, "minibatches": 2}
SAC: dict[str, Any] = {"kind": "sac", "warmup": 40, "batch_size": 16, "capacity": 500}


@pytest.fixture(autouse=True)
def same_bits() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    runs.reproducible(DEVICE)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_trunks_and_heads_compute_what_they_compute_in_float64(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.ModuleList([make_trunk(TRUNKS[kind], 12, 3), TaskMLP(3, (make_trunk(TRUNKS[kind], 12, 3).out, 2))])
    x = torch.randn(60, 12, generator=generator)
    task = torch.randint(3, (60,), generator=generator)
    pull = torch.randn(60, 2, generator=generator)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        net.to(device, dtype).zero_grad()
        where = task.to(device)
        out = net[1](net[0](x.to(device, dtype), where), where)
        (out * pull.to(device, dtype)).sum().backward()
        return [
            out.detach().cpu().double(),
            *(p.grad.cpu().double().clone() for p in net.parameters() if p.grad is not None),
        ]

    exact, found, again = run("cpu", torch.float64), run(DEVICE, torch.float32), run(DEVICE, torch.float32)
    for want, got, twice in zip(exact, found, again, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * max(1.0, float(want.abs().max())))
        assert torch.equal(got, twice)


def test_orthonormal_mixtures_are_those_of_the_cpu_also_where_experts_are_zero_or_agree() -> None:
    u = torch.randn(40, 4, 30, generator=torch.Generator().manual_seed(0))
    w = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(1))
    u[0, 2] = 0
    u[1, 3] = 2 * u[1, 0]
    u[2] = 0

    def run(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = u.to(device, dtype).requires_grad_()
        mixed = orthonormal_mixture(outputs, w.to(device, dtype))
        (grad,) = torch.autograd.grad(mixed.square().sum() + mixed[..., 0].sum(), outputs)
        return mixed.detach().cpu().double(), grad.cpu().double()

    (want, slope), (got, found) = run("cpu", torch.float64), run(DEVICE, torch.float32)
    assert torch.isfinite(got).all()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(got[3:], want[3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[3:], slope[3:], rtol=0, atol=1e-4 * float(slope[3:].abs().max()))


def test_rows_are_sorted_once_per_tensor_and_anew_when_it_changes() -> None:
    task = torch.tensor([2, 0, 1, 0], device=DEVICE)
    first = TaskRows.of(task, 3)
    assert first.order is not None
    assert first.order.tolist() == [1, 3, 2, 0]
    assert first.counts == (2, 1, 1)
    if DEVICE == "cuda":
        assert TaskRows.of(task, 3) is first
    task[0] = 1
    assert TaskRows.of(task, 3).counts == (2, 2, 0)
    with pytest.raises(IndexError, match="task id 1"):
        TaskRows.of(task, 1)


@pytest.mark.parametrize("method", get_args(Method))
def test_aggregated_gradients_are_those_of_the_cpu(method: Any) -> None:
    if method != "mean":
        pytest.importorskip("torchjd")
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))

    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
        losses = [(net(rows.to(device)) - k).square().mean() for k, rows in enumerate(x)]
        Aggregator(method, seed=0).backward(losses, net)
        return torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])

    want = run("cpu")
    torch.testing.assert_close(run(DEVICE), want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


LITTLE: dict[str, Any] = {"rollout": 8, "epochs": 1, "minibatches": 2}
MEMORY: dict[str, Any] = {"chunk": 4, "memory": 8, "action_value_weight": 0.5}
AGENTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("ppo", LITTLE, GROUPS),
    ("ppo", {**LITTLE, **MEMORY}, ("memory",)),
    ("ppo", {**LITTLE, "matmul": "bf16"}, GROUPS),
    ("ppo", {**LITTLE, **MEMORY, "matmul": "bf16"}, ("memory",)),
    ("ppo", {**LITTLE, "popart": True, "actor_gradients": "pcgrad"}, ("discrete",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2}, ("continuous",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2, "cuda_graph": False}, ("continuous",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2, "average": 0.9}, ("continuous",)),
    ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2, "matmul": "bf16"}, ("continuous",)),
    (
        "sac",
        {"warmup": 4, "batch_size": 4, "capacity": 100, "critic": "categorical", "reward_scale": "max_return"},
        ("continuous",),
    ),
    *(
        ("sac", {"warmup": 4, "batch_size": 4, "capacity": 100, "critic_balance": balance}, ("continuous",))
        for balance in get_args(BalancerName)
    ),
    ("sb3-ppo", {"n_steps": 8, "batch_size": 8, "n_epochs": 1}, ("masked",)),
    ("sb3-sac", {"learning_starts": 4, "batch_size": 4, "buffer_size": 100}, ("continuous",)),
]


@pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU")  # SB3's own advice
@pytest.mark.parametrize(("name", "options", "groups"), AGENTS)
def test_agents_keep_the_contract(name: str, options: dict[str, Any], groups: tuple[str, ...]) -> None:
    """Also that a resumed agent goes on bit for bit."""
    if options.get("actor_gradients"):
        pytest.importorskip("torchjd")
    report = check_agent(registry.agent(name), options=options, groups=groups, steps=24, device=DEVICE)
    assert report.ok, report


@pytest.mark.parametrize("agent", [PPO, SAC], ids=["ppo", "sac"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_any_trunk_learns_the_same_bits_twice(agent: Mapping[str, Any], kind: str, tmp_path: Path) -> None:
    group = "mix" if agent is PPO else "continuous"
    trunk = TRUNKS[kind].model_dump(mode="json")
    settings = config({**agent, "trunk": trunk}, f"mtrl.testing:Probes/{group}", steps=1_000)
    for out in ("one", "two"):
        train(settings, tmp_path / out)
    assert_same_run(tmp_path / "one", tmp_path / "two")


RECORDABLE = [kind for kind, trunk in TRUNKS.items() if trunk.recordable]


@pytest.mark.parametrize("critic", ["mse", "categorical"])
@pytest.mark.parametrize("kind", RECORDABLE)
def test_a_recorded_update_computes_the_bits_of_its_kernels_one_by_one(kind: str, critic: str, tmp_path: Path) -> None:
    agent = {**SAC, "trunk": TRUNKS[kind].model_dump(mode="json"), "critic": critic}
    for name, recorded in (("graph", True), ("kernels", False)):
        settings = config({**agent, "cuda_graph": recorded}, "mtrl.testing:Probes/continuous", steps=1_000)
        train(settings, tmp_path / name)
    assert_same_run(tmp_path / "graph", tmp_path / "kernels")


def test_updates_and_actions_are_recorded() -> None:
    options = {"trunk": TrunkConfig(widths=(16,)), "batch_size": 4, "capacity": 100, "warmup": 4}
    agent = SoftActorCritic(ragged_spec(), SoftActorCritic.Config(**options), seed=0, device=DEVICE)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 30)
    assert agent._update.replays == (agent.updates - WARM) * (DEVICE == "cuda")
    assert agent._acting[True].replays >= 10 * (DEVICE == "cuda")


def test_a_recording_reads_new_inputs_and_hands_out_results_that_last() -> None:
    def work(inputs: Any) -> dict[str, torch.Tensor]:
        return {"sum": inputs["x"] + inputs["task"]}

    graphed = Graphed(on=DEVICE == "cuda")
    tasks = [np.arange(3), np.arange(3)[::-1].copy()]
    numbers = [torch.full((3,), float(i), device=DEVICE) for i in range(6)]
    got = [
        [graphed(work, task, {"task": torch.as_tensor(task, device=DEVICE), "x": x}) for x in numbers] for task in tasks
    ]
    for task, results in zip(tasks, got, strict=True):
        assert [recorded for _, recorded in results] == [False] * 2 + [DEVICE == "cuda"] * 4
        for x, (found, _) in zip(numbers, results, strict=True):
            assert found["sum"].tolist() == (x.cpu().numpy() + task).tolist()
    assert graphed.replays == 8 * (DEVICE == "cuda")


@pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA alone")
def test_work_that_looks_at_numbers_cannot_be_recorded_and_torch_works_on() -> None:
    graphed = Graphed(on=True)
    stream = torch.cuda.current_stream()
    arguments = (lambda x: x * float(x.sum().item())), np.zeros(2, np.int64), torch.ones(2, device=DEVICE)
    for _ in range(2):
        assert graphed(*arguments)[0].tolist() == [2, 2]
    with pytest.raises(RuntimeError, match=r"no CUDA graph can be made of it: .*captur"):
        graphed(*arguments)
    assert torch.cuda.current_stream() == stream
    assert torch.ones(2, device=DEVICE).sum().item() == 2


@pytest.mark.parametrize(
    ("agent", "suite"),
    [
        (PPO, "minigrid/LavaGapS5+minigrid/Empty-Random-6x6"),
        ({**PPO, "memory": 16, "chunk": 25, "action_value_weight": 0.5}, "minigrid/MemoryS11+minigrid/LavaGapS5"),
        (PPO, "minigrid/LavaGapS5+metaworld/reach"),
        (SAC, "metaworld/mt3"),
    ],
    ids=["ppo", "memory", "mix", "sac"],
)
def test_a_run_on_real_tasks_resumes_bit_for_bit_and_its_policy_acts_on_the_cpu(
    agent: Mapping[str, Any], suite: str, tmp_path: Path
) -> None:
    settings = config(agent, suite, steps=3_000, checkpoint={"every": 700, "keep": 9})
    train(settings, tmp_path / "whole")
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "whole" / runs.CHECKPOINTS).glob("step-*"))
    rewind(tmp_path / "whole", tmp_path / "resumed", saved[1])
    train(settings, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    config_file = tmp_path / "whole" / runs.CONFIG
    config_file.write_text(config_file.read_text().replace(f"device: {DEVICE}", "device: cpu"))
    policy = mtrl.load(tmp_path / "whole")
    assert {p.device.type for p in policy.agent.policy.parameters()} == {"cpu"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("route", get_args(Route))
def test_every_route_of_products_is_taken(route: str, tmp_path: Path) -> None:
    train(
        config({**SAC, "matmul": route}, "mtrl.testing:Probes/continuous", steps=400),
        tmp_path / "run",
    )
    summary = (tmp_path / "run" / runs.SUMMARY).read_text()
    assert "NaN" not in summary


def config(agent: Mapping[str, Any], suite: str, steps: int, **changes: Any) -> RunConfig:
    given = {"agent": dict(agent), "suite": suite, "copies": 2, "workers": 0, "threads": 1, "steps": steps, "seed": 3}
    small = {"eval": {"episodes": 2}, "log": {"wandb": "off", "terminal": False, "every": 100}, "device": DEVICE}
    return parse_config({**given, **small, **changes})
