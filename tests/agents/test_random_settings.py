"""Any settings that an agent accepts keep the contract: many options, drawn at random, at once."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest

from mtrl import registry
from mtrl.nn.aggregation import Method
from mtrl.nn.balancers import BalancerName
from mtrl.nn.linear import Route
from mtrl.nn.trunk.config import Kind
from mtrl.testing import check_agent
from tests.trunks import small

METHODS, BALANCERS, ROUTES = get_args(Method), get_args(BalancerName), get_args(Route)
TRUNKS = tuple(small(kind, 16) for kind in get_args(Kind))
# Field -> values it may take; each is left as it is in two of three draws.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "ppo": {
        "epochs": (2,),
        "lr_decay_updates": (3,),
        "value_clip": (0.2,),
        "max_grad_norm": (None,),
        "action_value_weight": (0.5,),
        "actor_gradients": METHODS,
        "critic_gradients": METHODS,
        "critic_balance": BALANCERS,
        "target_kl": (1e-9, 0.1),
        "normalize_advantage": (False,),
        "advantage_decay": (0.0,),
        "normalize_value": (False,),
        "popart": (True,),
        "critic_fit": ("rollout",),
        "share": (True,),
        "matmul": ROUTES,
        "head": ((), (8, 8)),
        "head_activation": ("relu",),
        "inspect_every": (0, 1),
        "memory": (1, 8),
        "perception": ({"grid": "onehot", "width": 12}, {"grid": "cast", "vector": (8,)}, {"activation": "tanh"}),
        "trunk": TRUNKS,
    },
    "sac": {
        "critic_trunk": TRUNKS,
        "update_every": (2,),
        "updates": (2,),
        "grad_clip": (None,),
        "reward_scale": ("max_return", "mean_reward"),
        "critic_gradients": METHODS,
        "actor_gradients": METHODS,
        "critic_balance": BALANCERS,
        "critic": ("categorical",),
        "atoms": (2, 11),
        "matmul": ROUTES,
        "inspect_every": (0, 1),
        "tau": (1.0,),
        "gamma": (0.0,),
        "perception": ({"width": 12}, {"vector": (8,)}, {"activation": "tanh"}),
        "trunk": TRUNKS,
    },
}
BASE: dict[str, dict[str, Any]] = {
    "ppo": {"rollout": 8, "epochs": 1, "minibatches": 2},
    "sac": {"warmup": 4, "batch_size": 4, "capacity": 100, "log_every": 2},
}
GROUPS = {"ppo": ("discrete", "continuous", "mix", "masked", "image", "team", "memory"), "sac": ("continuous",)}
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 100)]


@pytest.mark.parametrize("seed", [*range(12), *SLOW])
@pytest.mark.parametrize("kind", CHOICES)
def test_any_settings_keep_the_contract_or_are_refused(kind: str, seed: int) -> None:
    pytest.importorskip("torchjd")
    draw = random.Random(f"{kind} {seed}")
    options = {**BASE[kind], **{key: draw.choice(own) for key, own in CHOICES[kind].items() if draw.random() < 1 / 3}}
    group = draw.choice(GROUPS[kind])
    report = check_agent(registry.agent(kind), options=options, groups=(group,), steps=18)
    # Settings that exclude each other are refused by the constructor.
    assert not [one for one in report.findings if one.level == "error" and "refuses" not in one.what], (options, report)
