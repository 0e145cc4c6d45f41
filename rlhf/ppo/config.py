"""PPOConfig: TRL's fields, with defaults that work on a language model and refusals of what can't work."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf.errors import InputError
from rlhf.ppo.upstream import TRLPPOConfig


@dataclass
class PPOConfig(TRLPPOConfig):
    """TRL's PPOConfig with these changes.

    Args:
        stop_token: defaults to `"eos"`. TRL's default, None, lets no reply end before `response_length`.
        sft_model_path: policy and reference start from it; default: the recipe's `--model_name_or_path`.
        reward_model_path: an adapter or full model that scores, by path or Hub id, or `starter`: the starter's scorer.
        model_adapter_name, ref_adapter_name: which adapters of a PeftModel are policy and reference. Without
            `ref_adapter_name` the reference is the model with its adapters off.
        normalize_reward: new. Rewards are shifted and scaled so that the first batch, which the SFT model samples,
            has mean 0 and standard deviation 1, as in lm-human-preferences. A reward model is only defined up to a
            constant; a large one, seen by a value function that starts at 0, rewards short replies for being short.
        remove_unused_columns: defaults to False: the prompts' other columns go to the reward functions.
        adam_epsilon: defaults to 1e-5, as in OpenAI's lm-human-preferences.
        max_steps: number of updates, in place of `total_episodes`, if above 0.
        num_sample_generations: how often in a run a few of the sampled completions are printed.

    Raises:
        InputError: for `kl_estimator="k3"`: as a reward its gradient vanishes to first order, so it doesn't hold the
            policy near the reference; and for numbers outside their range.
    """

    stop_token: Literal["eos"] | None = field(
        default="eos", metadata={"help": "'eos' ends replies at the tokenizer's eos token; see also stop_token_id."}
    )
    sft_model_path: str | None = field(
        default=None,
        metadata={"help": "SFT model or adapter that policy and reference start from. Default: model_name_or_path."},
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model: adapter or full model, folder or Hub id; or 'starter', its scorer."},
    )
    normalize_reward: bool = field(
        default=True,
        metadata={"help": "Scale rewards to mean 0 and standard deviation 1 on the first batch, the SFT model's own."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that are not model inputs."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_token is not None and self.stop_token_id is not None:
            self.stop_token = None  # a given id replaces the default
        if self.kl_estimator != "k1":
            raise InputError("--kl_estimator k3: as a reward it hardly restrains the KL. Use k1.")
        if not self.temperature > 0:
            raise InputError(f"--temperature {self.temperature}: must be above 0.")
        if self.response_length < 1:
            raise InputError(f"--response_length {self.response_length}: must be at least 1.")
        local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.num_mini_batches < 1 or local_batch_size % self.num_mini_batches:
            raise InputError(
                f"--num_mini_batches {self.num_mini_batches}: must divide per_device_train_batch_size × "
                f"gradient_accumulation_steps = {local_batch_size}."
            )
        if self.eval_strategy != "no":
            raise InputError(
                "--eval_strategy: PPO does not evaluate while it trains. Compare its checkpoints with eval/compare.py."
            )
        if "epoch" in (self.save_strategy, self.logging_strategy):
            raise InputError("--save_strategy and --logging_strategy: PPO has steps, not epochs. Use 'steps' or 'no'.")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise InputError(
                f"--missing_eos_penalty {self.missing_eos_penalty}: is subtracted, so it can't be negative."
            )
