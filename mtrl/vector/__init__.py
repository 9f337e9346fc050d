"""One vector of any tasks: see ``MultiTaskVectorEnv``."""

from mtrl.vector.env import Moment, MultiTaskVectorEnv, Replay, moments, replay
from mtrl.vector.schedule import EpisodeList, Pinned, episode_seed
from mtrl.vector.slots import EnvironmentFailedError, RenderError

__all__ = [
    "EnvironmentFailedError",
    "EpisodeList",
    "Moment",
    "MultiTaskVectorEnv",
    "Pinned",
    "RenderError",
    "Replay",
    "episode_seed",
    "moments",
    "replay",
]
