"""Rewards: functions, reward models and judges behind one call, found by name."""

from rlhf.rewards.answers import Completion, RewardError, Score, check_scores, completion_text
from rlhf.rewards.calling import (
    ARGUMENTS,
    RewardFunction,
    call_rewards,
    check_reward_function,
    need_scores,
    reward_columns,
    reward_name,
    reward_names,
    total_scores,
)
from rlhf.rewards.ensemble import Combination, RewardEnsemble, RewardScale, combine
from rlhf.rewards.judge import JudgeReward, JudgeSource, resolve_judge
from rlhf.rewards.log import RewardLog, gathered_means, with_own
from rlhf.rewards.model import RewardModel
from rlhf.rewards.rubrics import JUDGE, JudgeArguments
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
    "JUDGE",
    "Combination",
    "Completion",
    "EnsembleFlags",
    "JudgeArguments",
    "JudgeReward",
    "JudgeSource",
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
    "gathered_means",
    "load_reward",
    "load_rewards",
    "need_scores",
    "resolve_judge",
    "resolve_reward",
    "resolve_reward_functions",
    "resolve_rewards",
    "reward_columns",
    "reward_functions",
    "reward_model_paths",
    "reward_name",
    "reward_names",
    "starter_reward",
    "total_scores",
    "with_own",
]
