"""PPO for language models, on TRL's interface: `from rlhf.ppo import PPOConfig, PPOTrainer`."""

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
