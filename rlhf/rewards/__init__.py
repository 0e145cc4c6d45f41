"""Rewards: functions and reward models behind one call, found by name."""

from rlhf.rewards.answers import Completion, RewardError, Score, check_scores, completion_text
from rlhf.rewards.calling import (
    ARGUMENTS,
    RewardFunction,
    call_rewards,
    check_reward_function,
    need_scores,
    reward_name,
    reward_names,
    total_scores,
)
from rlhf.rewards.ensemble import Combination, RewardEnsemble, RewardScale, combine
from rlhf.rewards.log import RewardLog, with_own
from rlhf.rewards.model import RewardModel
from rlhf.rewards.sources import (
    EnsembleFlags,
    RewardArgument,
    RewardFlags,
    RewardSource,
    load_reward,
    load_rewards,
    resolve_reward,
    resolve_reward_functions,
    resolve_rewards,
    reward_functions,
    reward_model_paths,
    starter_reward,
)

__all__ = [
    "ARGUMENTS",
    "Combination",
    "Completion",
    "EnsembleFlags",
    "RewardArgument",
    "RewardEnsemble",
    "RewardError",
    "RewardFlags",
    "RewardFunction",
    "RewardLog",
    "RewardModel",
    "RewardScale",
    "RewardSource",
    "Score",
    "call_rewards",
    "check_reward_function",
    "check_scores",
    "combine",
    "completion_text",
    "load_reward",
    "load_rewards",
    "need_scores",
    "resolve_reward",
    "resolve_reward_functions",
    "resolve_rewards",
    "reward_functions",
    "reward_model_paths",
    "reward_name",
    "reward_names",
    "starter_reward",
    "total_scores",
    "with_own",
]
