"""The one place that knows whether TRL has PPO.

TRL moved PPOTrainer to `trl.experimental.ppo` and removed it in 1.13 (https://github.com/huggingface/trl/pull/7020).
With 1.12 PPOTrainer here is a subclass of TRL's. With later releases it is the same class on transformers' Trainer.
"""

import warnings
from importlib.metadata import version

from packaging.version import Version

from rlhf.errors import InputError

HAS_TRL_PPO = Version(version("trl")) < Version("1.13")

if HAS_TRL_PPO:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental.*")
        from trl.experimental.ppo import PPOConfig as TRLPPOConfig
        from trl.experimental.ppo import PPOTrainer as TRLPPOTrainer
        from trl.experimental.ppo.ppo_trainer import OnlineTrainerState
else:
    from rlhf.ppo.standalone import StandalonePPOConfig as TRLPPOConfig
    from rlhf.ppo.standalone import StandalonePPOTrainer as TRLPPOTrainer
    from rlhf.ppo.standalone import StandaloneState as OnlineTrainerState

__all__ = ["HAS_TRL_PPO", "OnlineTrainerState", "TRLPPOConfig", "TRLPPOTrainer", "need_trl_ppo"]


def need_trl_ppo() -> None:
    """Raise InputError where TRL has no PPO to compare with."""
    if not HAS_TRL_PPO:
        raise InputError(f"trl {version('trl')} has no PPOTrainer to compare with. Install trl 1.12.0.")
