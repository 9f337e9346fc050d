"""The training loop without the training run: for tests that let an agent play a handful of probe tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mtrl.types import Agent, Episode, Step, Task
from mtrl.vector import MultiTaskVectorEnv


def drive(
    agent: Agent, tasks: Sequence[Task], steps: int, *, copies: int = 1, seed: int = 0, explore: bool = True
) -> Iterator[tuple[Step, Mapping[str, float], list[Episode]]]:
    """Step ``tasks`` x ``copies`` in this process and let ``agent`` learn (only if ``explore``).

    Args:
        agent: built for the spec of these tasks.
        steps: vector steps.

    Yields:
        After every vector step: the step, the update's metrics ({} when it was not time), the episodes it finished.
    """
    envs = MultiTaskVectorEnv(tasks, copies, seed=seed)
    try:
        envs.reset()
        obs = envs.obs
        actor = agent.actor(envs.layout, explore=explore)
        for _ in range(steps):
            decision = actor(obs)
            envs.step_async(decision.action)
            metrics = agent.update() if explore else {}
            step, obs = envs.step_wait(decision)
            if explore:
                agent.observe(step)
            yield step, metrics, envs.episodes
    finally:
        envs.close()
