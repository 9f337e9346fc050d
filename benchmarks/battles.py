"""Battle steps per CPU-second of the engine behind the suite ``smac``, with SMAX beside it where jaxmarl is installed.

    python benchmarks/battles.py [--maps 3m 2s3z 27m_vs_30m] [--batches 1 8 64 512] [--seconds 2]
    python benchmarks/battles.py --scores [--battles 4096]

The first form plays random legal actions. A step includes drawing the actions, the enemies' policy, observations,
global state, legal actions and the resets of ended battles. CPU-seconds count all threads of the process (XLA uses
several), compilation is not timed. SMAX (jaxmarl 0.2.0, ``pip install "mtrl-suite[smax]"``) plays the same maps with
its own scripted enemies, random legal actions and auto-reset, vectorised over 64 battles, and over 400 without resets,
its fastest setting.

The second form measures the score scale of the suite (mean returns of random legal actions and of the scripted policy)
and writes ``envs/mtrl_envs/smac/scores.json``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtrl.files import write_text
from mtrl.types import Array
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.scenarios import groups, parse

SCORES = Path(__file__).parents[1] / "envs" / "mtrl_envs" / "smac" / "scores.json"
SMAX_STEPS = 16  # in one call, compiled as one loop


def random_legal(battles: Battles, rng: np.random.Generator) -> Array:
    """Uniform over each unit's legal actions, [B, n_allies]."""
    return np.argmax(rng.random(battles.legal.shape, np.float32) * battles.legal, axis=2)


def play(battles: Battles, rng: np.random.Generator, steps: int, seed: int) -> int:
    """Step all battles ``steps`` times, restarting those that end; returns the next unused seed."""
    for _ in range(steps):
        ended = battles.step(random_legal(battles, rng))
        over = ended.terminated | ended.truncated
        if over.any():
            battles.reset(over, np.arange(seed, seed + battles.size))
            seed += battles.size
    return seed


def rate(name: str, size: int, seconds: float) -> float:
    """Battle steps per CPU-second of a batch of ``size``."""
    battles, rng = Battles([parse(name)], size), np.random.default_rng(0)
    battles.reset(np.ones(size, bool), np.arange(size))
    seed = play(battles, rng, 20, size)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        seed = play(battles, rng, 20, seed)
        steps += 20
    return steps * size / (time.process_time() - start)


def smax_rate(name: str, size: int, seconds: float, *, resets: bool) -> float:
    """The same of SMAX, ``size`` battles under ``vmap``."""
    jax: Any = importlib.import_module("jax")
    jnp, smax = jax.numpy, importlib.import_module("jaxmarl.environments.smax")
    env: Any = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(name))

    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        key, state = carry
        key, act, move = jax.random.split(key, 3)
        legal = env.get_avail_actions(state)
        draws = jax.random.split(act, env.num_agents)
        actions = {
            agent: jax.random.categorical(draw, jnp.where(legal[agent] > 0, 0.0, -1e9))
            for agent, draw in zip(env.agents, draws, strict=True)
        }
        advance = env.step if resets else env.step_env
        obs, state, reward, _, _ = advance(move, state, actions)
        # What an agent would read; a sum keeps XLA from leaving anything out.
        read = sum(jnp.sum(x) for x in obs.values()) + reward[env.agents[0]] + sum(jnp.sum(x) for x in legal.values())
        return (key, state), read

    start_all = jax.jit(jax.vmap(env.reset))
    loop = jax.jit(jax.vmap(lambda key, state: jax.lax.scan(step, (key, state), None, SMAX_STEPS)))
    keys = jax.random.split(jax.random.PRNGKey(0), size)
    _, state = start_all(keys)
    ((keys, state), read) = loop(keys, state)
    read.block_until_ready()
    if not resets:
        _, state = start_all(keys)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        (keys, state), read = loop(keys, state)
        read.block_until_ready()
        steps += SMAX_STEPS
    return steps * size / (time.process_time() - start)


def evaluate(name: str, act: Callable[[Battles], Array], battles: int) -> dict[str, float]:
    """Mean return, win rate and length of ``battles`` battles with the seeds 0, 1, ..."""
    batch = Battles([parse(name)], battles)
    batch.reset(np.ones(battles, bool), np.arange(battles))
    ret, won = np.zeros(battles), np.zeros(battles, bool)
    while not batch.clocks.over.all():
        outcome = batch.step(act(batch))
        ret += outcome.reward
        won |= outcome.success
    return {"return": float(ret.mean()), "win": float(won.mean()), "length": float(batch.clocks.step.mean())}


def measure_scores(battles: int) -> None:
    maps = sorted({name for names in groups().values() for name in names}, key=lambda name: (len(name), name))
    found = {}
    for name in maps:
        rng = np.random.default_rng(0)
        random = evaluate(name, lambda batch, rng=rng: random_legal(batch, rng), battles)
        scripted = evaluate(name, Battles.script, battles)
        print(f"{name:18} random {random['return']:.3f}   scripted {scripted['return']:.3f} won {scripted['win']:.3f}")
        found[name] = {"random": round(random["return"], 4), "scripted": round(scripted["return"], 4)}
    write_text(SCORES, json.dumps({"battles": battles, "maps": found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", default=["3m", "2s3z", "27m_vs_30m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU-seconds per number")
    parser.add_argument("--scores", action="store_true", help="measure the score scale instead")
    parser.add_argument("--battles", type=int, default=4096, help="battles per number of the score scale")
    args = parser.parse_args()
    if args.scores:
        measure_scores(args.battles)
        return
    peer = importlib.util.find_spec("jaxmarl") is not None
    heads = [f"B = {size}" for size in args.batches] + (["SMAX 64", "ratio", "SMAX 400", "ratio"] if peer else [])
    print("battle steps per CPU-second" + ("" if peer else " (SMAX: not installed)"))
    print(f"{'map':14}" + "".join(f"{head:>11}" for head in heads))
    for name in args.maps:
        own = [rate(name, size, args.seconds) for size in args.batches]
        cells = [f"{one:,.0f}" for one in own]
        if peer:
            at_64 = own[args.batches.index(64)] if 64 in args.batches else max(own)
            for size, resets, best in ((64, True, at_64), (400, False, max(own))):
                other = smax_rate(name, size, args.seconds, resets=resets)
                cells += [f"{other:,.0f}", f"{best / other:.0f}x"]
        print(f"{name:14}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
