"""Rewards: functions and reward models behind one call, found by name."""

from rlhf.rewards.calling import (
    Completion,
    RewardError,
    RewardFunction,
    Score,
    call_rewards,
    check_scores,
    completion_text,
    reward_name,
)
from rlhf.rewards.model import RewardModel
from rlhf.rewards.sources import (
    RewardFlags,
    RewardSource,
    load_reward,
    resolve_reward,
    resolve_reward_functions,
    resolve_rewards,
    starter_reward,
)

__all__ = [
    "Completion",
    "RewardError",
    "RewardFlags",
    "RewardFunction",
    "RewardModel",
    "RewardSource",
    "Score",
    "call_rewards",
    "check_scores",
    "completion_text",
    "load_reward",
    "resolve_reward",
    "resolve_reward_functions",
    "resolve_rewards",
    "reward_name",
    "starter_reward",
]
