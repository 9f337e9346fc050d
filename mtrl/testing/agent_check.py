"""``check_agent``: does an agent keep the contract of ``mtrl.types``, played on the probe tasks?"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Discrete

from mtrl import checkpoint
from mtrl.spaces import make_spec
from mtrl.testing.check import Finding, Report, changed, global_state
from mtrl.testing.compare import difference
from mtrl.testing.probes import Probes
from mtrl.types import Agent, Decision, Layout, Obs, Spec, Task
from mtrl.vector import MultiTaskVectorEnv

GROUPS = ("discrete", "continuous", "mix", "masked", "image", "team")
_EVALUATION_STEPS = 5


def check_agent(
    agent_class: Any,
    *,
    options: Mapping[str, Any] | None = None,
    groups: Sequence[str] = GROUPS,
    steps: int = 40,
    copies: int = 2,
    device: str = "cpu",
) -> Report:
    """Let an agent learn on probe tasks in this process and check all that it returns and keeps.

    Half-way its state goes through a checkpoint into a second agent, made with another seed, that then sees the same
    steps: from there on both must decide, learn and remember alike, bit for bit.

    Args:
        agent_class: what the entry point names, with its ``Config``.
        options: fields of ``Config``; small rollouts or batches, so that it learns within ``steps``.
        groups: of ``mtrl.testing.Probes``. A group that the agent refuses with a ``ValueError`` is a note.
        steps: vector steps per group.
        copies: environments per task.
        device: of the agent; for ``cuda`` call ``mtrl.runs.reproducible`` first, or equal seeds give unequal bits.
    """
    findings: list[Finding] = []
    refused = 0
    for name in groups:
        check = _AgentCheck(agent_class, dict(options or {}), f"probe/{name}", Probes().tasks(name), copies, device)
        findings += check.run(steps)
        refused += check.refused
    if refused == len(groups):
        what = f"refuses every one of {', '.join(groups)}"
        findings.append(Finding("error", agent_class.__name__, what, "name the groups that it takes in groups=..."))
    return Report(f"agent {agent_class.__name__}", tuple(f"probe/{name}" for name in groups), tuple(findings))


class _AbandonError(Exception):
    """The agent cannot be examined further on this group; the reason is among the findings."""


class _AgentCheck:
    """One agent on one group of probes. Every kind of finding is reported once."""

    def __init__(
        self, agent_class: Any, options: dict[str, Any], name: str, tasks: Sequence[Task], copies: int, device: str
    ) -> None:
        self._class, self._options, self._name = agent_class, options, name
        self._tasks, self._copies, self._device = tasks, copies, device
        self._findings: dict[str, Finding] = {}
        self.refused = False

    def run(self, steps: int) -> list[Finding]:
        spec = make_spec(self._tasks)
        envs = MultiTaskVectorEnv(self._tasks, self._copies, spec=spec)
        try:
            envs.reset(seed=0)
            self._check(spec, envs, steps)
        except _AbandonError:
            pass
        finally:
            envs.close()
        return list(self._findings.values())

    def _check(self, spec: Spec, envs: MultiTaskVectorEnv, steps: int) -> None:
        agent, actor = self._make(spec, envs.layout, seed=0)
        again, _ = self._make(spec, envs.layout, seed=0)
        self._same("seed", agent.state_dict(), again.state_dict(), "two agents of one seed differ in their state")
        self._learn(agent, actor, envs, steps // 2)
        before = copy.deepcopy(agent.state_dict())
        greedy = self._act(agent, spec)
        self._same("evaluation", before, agent.state_dict(), "acting with explore=False changes the agent's state")
        with self._calling("saving or loading the state"), tempfile.TemporaryDirectory() as folder:
            # The very path of a run that is interrupted and resumed; it refuses all but plain data.
            checkpoint.save(Path(folder), 0, {"agent": agent.state_dict(), "actor": actor.state_dict()}, {})
            saved = checkpoint.load(Path(folder)).state
        if "policy" not in saved["agent"]:
            raise self._abandon("policy", "state_dict() has no key 'policy'", "put there all that acting needs")
        again.load_policy(saved["agent"]["policy"])
        what = "load_policy(state_dict()['policy']) does not restore what acting needs: greedy decisions differ"
        self._same("policy", greedy, self._act(again, spec), what)
        twin, twin_actor = self._make(spec, envs.layout, seed=1)
        with self._calling("load_state_dict()"):
            twin.load_state_dict(saved["agent"])
            twin_actor.load_state_dict(saved["actor"])
        what = "the state that was loaded differs from the state that was saved"
        self._same("load", agent.state_dict(), twin.state_dict(), what)
        self._same("load actor", actor.state_dict(), twin_actor.state_dict(), what)
        updates = self._learn(agent, actor, envs, steps - steps // 2, twin, twin_actor)
        what = "after loading, the same steps lead to another state"
        self._same("resume", agent.state_dict(), twin.state_dict(), what)
        if not updates:
            self._report(
                "note",
                "updates",
                f"update() did not learn in the last {steps - steps // 2} of {steps} steps",
                "pass options with a smaller rollout, batch or warm-up (or more steps), so that learning is checked",
            )

    def _make(self, spec: Spec, layout: Layout, seed: int) -> tuple[Agent, Any]:
        with self._calling("the constructor", refusal=True):
            agent = self._class(spec, self._class.Config(**self._options), seed=seed, device=self._device)
        if not isinstance(getattr(agent, "recurrent", None), bool):
            fix = "set recurrent = False, or True if actors carry memory from step to step"
            self._error("recurrent", "the agent does not say whether it is recurrent", fix)
        with self._calling("actor()"):
            return agent, agent.actor(layout, explore=True)

    def _learn(
        self,
        agent: Agent,
        actor: Any,
        envs: MultiTaskVectorEnv,
        steps: int,
        twin: Agent | None = None,
        twin_actor: Any = None,
    ) -> int:
        """Play and learn; a twin, if given, sees the same and must do the same. Returns how often it learnt."""
        learnt = 0
        for _ in range(steps):
            obs = envs.obs
            decision = self._decide(actor, obs, envs)
            envs.step_async(decision.action)
            metrics = self._update(agent)
            step, _ = envs.step_wait(decision)
            with self._calling("observe()"):
                agent.observe(step)
            if twin is not None:
                what = "after loading, the same steps lead to"
                self._same("twin decision", decision, self._decide(twin_actor, obs, envs), f"{what} other decisions")
                self._same("twin metrics", metrics, self._update(twin), f"{what} other metrics")
                twin.observe(step)
            learnt += bool(metrics)
        return learnt

    def _act(self, agent: Agent, spec: Spec) -> list[Decision]:
        """Greedy decisions on a vector with fewer rows than the training vector, as in evaluation."""
        envs = MultiTaskVectorEnv(self._tasks, spec=spec, seed=1)
        decisions = []
        try:
            envs.reset()
            with self._calling("actor()"):
                actor = agent.actor(envs.layout, explore=False)
            for _ in range(_EVALUATION_STEPS):
                decisions.append(self._decide(actor, envs.obs, envs))
                envs.step_async(decisions[-1].action)
                envs.step_wait(decisions[-1])
        finally:
            envs.close()
        return decisions

    def _decide(self, actor: Any, obs: Obs, envs: MultiTaskVectorEnv) -> Decision:
        with self._calling("the actor"):
            decision = actor(obs)
        problem = _decision_problem(decision, obs, envs.spec, envs.layout)
        if problem is not None:
            raise self._abandon("decision", problem, "see mtrl.types.Decision")
        return decision

    def _update(self, agent: Agent) -> Mapping[str, float]:
        with self._calling("update()"):
            metrics = agent.update()
        for name, value in metrics.items():
            if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
                self._error("metrics", f"update() gives {name} = {value!r}", "return finite floats: tensor.item()")
        return metrics

    def _same(self, key: str, a: Any, b: Any, what: str) -> None:
        place = difference(_plain(a), _plain(b))
        if place is not None:
            fix = "keep everything that decides the future in state_dict(), and seed every generator from seed"
            self._error(key, f"{what}: {place}", fix)

    @contextmanager
    def _calling(self, where: str, refusal: bool = False) -> Iterator[None]:
        before = {**global_state(), "torch": torch.random.get_rng_state().numpy().copy()}
        try:
            yield
        except Exception as error:
            if refusal and isinstance(error, ValueError):
                self.refused = True
                if not any(group.name in str(error) for group in make_spec(self._tasks).groups):
                    self._error("refusal", f"refuses with {str(error)!r}", "name the group that it cannot take")
                self._report("note", "refused", f"refuses: {error}", "nothing to do if that is intended")
                raise _AbandonError from error
            what = f"{where} raised {type(error).__name__}: {error}"
            raise self._abandon(
                "raised", what, "mend it, or refuse this group in the constructor with a ValueError"
            ) from error
        for name in changed(before, {**global_state(), "torch": torch.random.get_rng_state().numpy()}):
            self._error(
                f"global {name}",
                f"{where} changes the global random state of {name}",
                "draw from generators of the agent's own; make networks under torch.random.fork_rng()",
            )

    def _report(self, level: Literal["error", "note"], key: str, what: str, fix: str) -> None:
        self._findings.setdefault(key, Finding(level, self._name, what, fix))

    def _error(self, key: str, what: str, fix: str) -> None:
        self._report("error", key, what, fix)

    def _abandon(self, key: str, what: str, fix: str) -> _AbandonError:
        self._error(key, what, fix)
        return _AbandonError()


def _plain(value: Any) -> Any:
    """Tensors as arrays of their bytes, so that ``difference`` can compare them bit for bit."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        return flat.view(torch.uint8).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return {str(index): _plain(inner) for index, inner in enumerate(value)}
    return value


def _decision_problem(decision: Decision, obs: Obs, spec: Spec, layout: Layout) -> str | None:
    """What is wrong with a decision, or None."""
    if set(decision.action) != set(layout.rows):
        return f"actions for groups {sorted(decision.action)}, but the layout has {sorted(layout.rows)}"
    for name, rows in layout.rows.items():
        space, action = spec.group(name).action, np.asarray(decision.action[name])
        discrete = isinstance(space, Discrete)
        shape = (rows.stop - rows.start, *(space.shape or ()))
        dtype = np.dtype(np.int64 if discrete else np.float32)
        if action.shape != shape or action.dtype != dtype:
            return f"group {name}: actions are {action.dtype} {action.shape}, not {dtype} {shape}"
        if not all(space.contains(row) for row in action):
            return f"group {name}: an action is outside {space}: {next(r for r in action if not space.contains(r))}"
        legal = obs.leaves[name].get("legal")
        if legal is not None and not legal[np.arange(len(action)), action].all():
            return f"group {name}: an action is illegal (see the leaf 'legal')"
    for name, extra in decision.extras.items():
        if np.shape(extra)[:1] != (layout.num_rows,):
            return f"extras[{name!r}] has shape {np.shape(extra)}, its first axis must be the {layout.num_rows} rows"
    return None
