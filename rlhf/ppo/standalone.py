"""What rlhf/ppo builds on where TRL has no PPO: the flags and the state of TRL 1.12's, on transformers' own classes."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import Trainer, TrainerState, TrainingArguments


@dataclass
class StandalonePPOConfig(TrainingArguments):
    """The fields of TRL 1.12's PPOConfig, with its defaults."""

    # those of every TRL trainer
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "See activation_checkpointing."})
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16. Default: true without fp16."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More settings of the learning rate's schedule, as JSON."}
    )
    # of PPO
    learning_rate: float = field(default=3e-6, metadata={"help": "Peak learning rate."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the dataset."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in a pass over a batch."})
    total_episodes: int | None = field(default=None, metadata={"help": "Completions to sample in the whole run."})
    local_rollout_forward_batch_size: int = field(default=64, metadata={"help": "Prompts to sample from at a time."})
    num_sample_generations: int = field(default=10, metadata={"help": "How often a few completions are printed."})
    response_length: int = field(default=53, metadata={"help": "Largest number of tokens of a completion."})
    stop_token: Literal["eos"] | None = field(default=None, metadata={"help": "'eos', or none."})
    stop_token_id: int | None = field(default=None, metadata={"help": "Id of a token that ends a completion."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of sampling."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that never ended."}
    )
    sft_model_path: str | None = field(default=None, metadata={"help": "SFT model."})
    world_size: int | None = field(default=None, metadata={"help": "Filled in: number of processes."})
    num_total_batches: int | None = field(default=None, metadata={"help": "Filled in: number of updates."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Filled in: rows of a forward pass."})
    local_batch_size: int | None = field(default=None, metadata={"help": "Filled in: rows of a process's batch."})
    batch_size: int | None = field(default=None, metadata={"help": "Filled in: rows of a batch."})
    local_mini_batch_size: int | None = field(default=None, metadata={"help": "Filled in: rows of its minibatch."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Filled in: rows of a minibatch."})
    reward_model_path: str | None = field(default=None, metadata={"help": "Reward model."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "The adapter that is trained."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "The adapter that is the reference."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the rewards of tokens to variance 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty."})
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata={"help": "Estimator of the KL: k1."})
    cliprange: float = field(default=0.2, metadata={"help": "Range in which the ratio of probabilities counts."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Range in which values may move in an update."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "DeepSpeed ZeRO-3: gather the weights to sample."}
    )

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


@dataclass
class StandaloneState(TrainerState):
    """A Trainer's state that also counts completions."""

    episode: int = 0


class StandalonePPOTrainer(Trainer):
    """transformers' Trainer with the tag that TRL's PPOTrainer gave its model cards."""

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """As the Trainer's, with the tag `ppo`."""
        given = [tags] if isinstance(tags, str) else tags or []
        super().create_model_card(*args, tags=[*given, "ppo"], **kwargs)
