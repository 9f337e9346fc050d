"""One vector of any tasks: see ``MultiTaskVectorEnv``."""

from mtrl.vector.env import MultiTaskVectorEnv, Replay, replay
from mtrl.vector.schedule import EpisodeList, Pinned, episode_seed
from mtrl.vector.slots import EnvironmentFailedError

__all__ = [
    "EnvironmentFailedError",
    "EpisodeList",
    "MultiTaskVectorEnv",
    "Pinned",
    "Replay",
    "episode_seed",
    "replay",
]
