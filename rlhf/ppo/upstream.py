"""The one place that imports TRL's PPO.

TRL moved PPOTrainer to `trl.experimental.ppo` and removed it in 1.13 (https://github.com/huggingface/trl/pull/7020);
1.12.0 is the last release that has it, hence the pin in pyproject.toml.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.ppo import PPOConfig as TRLPPOConfig
    from trl.experimental.ppo import PPOTrainer as TRLPPOTrainer
    from trl.experimental.ppo.ppo_trainer import OnlineTrainerState

__all__ = ["OnlineTrainerState", "TRLPPOConfig", "TRLPPOTrainer"]
