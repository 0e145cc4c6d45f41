"""PPOConfig: TRL's fields, new fields, and errors for settings that can't work."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.engines.arguments import EngineArguments
from rlhf.errors import InputError
from rlhf.ppo.upstream import TRLPPOConfig
from rlhf.rewards.ensemble import Combination
from rlhf.rewards.rubrics import JudgeArguments
from rlhf.run.ranges import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_ranges

VALUE_FILE = "value_function.safetensors"  # a run's value function, in its output folder
# Settings of transformers' training loop that PPO's own loop doesn't read, and the values that ask for nothing.
UNUSED = {
    "neftune_noise_alpha": None, "label_smoothing_factor": 0.0, "auto_find_batch_size": False,
    "use_liger_kernel": False, "include_num_input_tokens_seen": "no",
}  # fmt: skip


@dataclass
class PPOConfig(EngineArguments, JudgeArguments, TRLPPOConfig):
    """TRL's PPOConfig with GRPOConfig's flags of engines (EngineArguments), those of a judge and these changes.

    Args:
        stop_token: defaults to `"eos"`. TRL's default, None, lets no reply end before `response_length`.
        stop_token_id: one or several token ids, which replace `stop_token`.
        stop_strings: a completion also ends once its text contains one of these.
        sft_model_path: policy and reference start from it; default: the recipe's `--model_name_or_path`. If the latter
            is another adapter of the same base, the policy continues from it, and only the reference is the SFT model.
        reward_model_path: an adapter or full model that scores, by path or Hub id, or `starter`: the starter's scorer.
            Several are an ensemble, which is one reward.
        reward_ensemble, uwo_coef: how an ensemble's scores are combined (rlhf/rewards/ensemble.py).
        ds3_gather_for_generation: counts under FSDP2; DeepSpeed's ZeRO-3, for which TRL has it, always gathers.
        model_init_kwargs: how PPOTrainer loads models that are given by name; GRPOConfig's field. Possible are `dtype`,
            `revision` (of the policy), `attn_implementation` and `trust_remote_code`.
        model_adapter_name, ref_adapter_name: which adapters of a PeftModel are policy and reference. Without
            `ref_adapter_name` the reference is the model with its adapters off.
        remove_unused_columns: defaults to False: the prompts' other columns go to the reward functions.
        adam_epsilon: defaults to 1e-5, as in OpenAI's lm-human-preferences.
        max_steps: number of updates; replaces `total_episodes` if above 0.
        num_sample_generations: how many times in a run a few sampled completions are printed.
        reward_funcs, eval_reward_funcs: names for the command line: import paths, reward models, or `judge` (see
            `JudgeArguments`). From Python, pass functions to PPOTrainer.
        reward_weights: one per reward; GRPOConfig's field.
        normalize_reward: rewards are shifted and scaled so that the first batch, which the SFT model samples, has mean
            0 and standard deviation 1, as in lm-human-preferences. A reward model's scores are defined only up to a
            constant. With a value function that starts at 0, a large constant would reward replies for being short.
        score_clip: scores are clipped to ± this after normalization.
        length_penalty: subtracted from the score per completion token.
        missing_eos_score: replaces the score of a completion that never ended (-1 in lm-human-preferences).
        adaptive_kl_target, adaptive_kl_horizon: adjust `kl_coef` so that the KL of a completion stays near the target
            (Ziegler et al., section 2.2); None keeps it fixed.
        epsilon_high: ratios are clipped to [1 - cliprange, 1 + epsilon_high]; None: 1 + cliprange. GRPOConfig's field.
            A larger one lets rare tokens become likely faster ("clip-higher", https://arxiv.org/abs/2503.14476, eq. 8).
        target_kl: ends an update when the policy has moved this far from the policy that sampled (mean of squared log
            ratios / 2, in nats per token).
        value_function: a `head` on the policy's trunk; or with LoRA an `adapter` of its own with a head, or a head on
            the frozen adapter of the `reward` model. None: `reward` where a reward adapter shares the policy's base,
            else `head`. A `value_model` passed to PPOTrainer takes precedence.
        value_model_path: output folder of a finished PPO run, whose value function this one starts as.
        value_learning_rate: of the value function's own parameters; None: `learning_rate`, and ten times that for a
            head on the reward model, which alone has to follow the rising returns.
        value_warmup_steps: number of initial updates that train only the value function.
        entropy_coef: weight of an entropy bonus in the loss.
        ptx_coef, ptx_dataset_name: PPO-ptx: adds the language model loss on this dataset with this weight (InstructGPT,
            eq. 2).

    Raises:
        InputError: for a number outside its range, and for `kl_estimator="k3"`. As a reward, k3 has a gradient that
            vanishes to first order, so it doesn't hold the policy near the reference.
    """

    stop_token: Literal["eos"] | None = field(
        default="eos",
        metadata={
            "help": "'eos' ends replies at the eos tokens of tokenizer and generation_config; see also stop_token_id."
        },
    )
    stop_token_id: list[NonNegativeInt] | None = field(
        default=None, metadata={"help": "Token ids that end a reply; they replace stop_token."}
    )
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end a reply."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})
    sft_model_path: str | None = field(
        default=None,
        metadata={"help": "SFT model: the reference, and the policy's start unless model_name_or_path is an adapter."},
    )
    reward_model_path: list[str] | None | str = field(  # noqa: RUF036 - the parser reads the first
        default=None,
        metadata={
            "help": "Reward model: adapter or full model, folder or Hub id; or 'starter', its scorer. Several are "
            "an ensemble."
        },
    )
    reward_ensemble: Combination = field(
        default="mean",
        metadata={
            "help": "How several reward models are combined: their mean, the worst (wco), or the mean minus uwo_coef "
            "times their variance (uwo)."
        },
    )
    uwo_coef: NonNegativeFloat = field(default=0.1, metadata={"help": "Weight of the variance in uwo."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: import paths of functions (package.module.function), reward models, 'judge', or "
            "'starter': its scorer. That is also what PPO takes without any reward."
        },
    )
    reward_weights: list[FiniteFloat] | None = field(
        default=None,
        metadata={"help": "Weight of each reward: reward_model_path first, then reward_funcs. Default: 1."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards for evaluation only, named as in reward_funcs."}
    )
    normalize_reward: bool = field(
        default=True,
        metadata={"help": "Scale rewards to mean 0 and standard deviation 1 on the first batch (the SFT model's)."},
    )
    score_clip: PositiveFloat | None = field(
        default=None, metadata={"help": "Clip scores to plus or minus this, after normalization."}
    )
    length_penalty: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Subtracted from the score per completion token."}
    )
    missing_eos_score: FiniteFloat | None = field(
        default=None, metadata={"help": "Replaces the score of a completion that never ended."}
    )
    adaptive_kl_target: PositiveFloat | None = field(
        default=None, metadata={"help": "Adjust kl_coef to keep the KL per completion near this. Default: fixed."}
    )
    adaptive_kl_horizon: PositiveInt = field(
        default=10_000, metadata={"help": "Episodes in which the adaptive kl_coef can change by about a fifth."}
    )
    epsilon_high: PositiveFloat | None = field(
        default=None, metadata={"help": "Upper end of the clipping of ratios. Default: cliprange."}
    )
    target_kl: PositiveFloat | None = field(
        default=None, metadata={"help": "End an update early when its approxkl exceeds this."}
    )
    value_function: Literal["head", "adapter", "reward"] | None = field(
        default=None,
        metadata={
            "help": "A head on the policy's trunk, an adapter of its own, or a head on the reward adapter. Default: "
            "reward, if it shares the base; else head."
        },
    )
    value_model_path: str | None = field(
        default=None, metadata={"help": "A finished PPO run, whose value function this one starts as."}
    )
    value_learning_rate: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the value function. Default: learning_rate; on the reward adapter, 10 times it."
        },
    )
    value_warmup_steps: NonNegativeInt = field(
        default=0, metadata={"help": "Number of initial updates that train only the value function."}
    )
    entropy_coef: NonNegativeFloat = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    ptx_coef: NonNegativeFloat = field(
        default=0.0, metadata={"help": "Weight of the language model loss on ptx_dataset_name."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset for ptx_coef: conversations or text, as for SFT."}
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "FSDP2: gather all weights to sample and score. False: a layer at a time, slower, for models that "
            "don't fit on one GPU."
        },
    )
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "From Python: how models that are given by name are loaded."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that are not model inputs."})
    adam_epsilon: NonNegativeFloat = field(default=1e-5, metadata={"help": "Epsilon of Adam."})

    def __post_init__(self) -> None:
        check_ranges(self)
        self.check_importance_sampling()
        if "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:
            # else transformers loads the weights on the main process alone, and the others try empty ones
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if self.deepspeed:
            raise InputError("--deepspeed: PPO takes DeepSpeed's settings from accelerate. Use accelerate launch "
                             "--config_file recipes/accelerate/zero3.yaml, or zero2.yaml.")  # fmt: skip
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, the default
        super().__post_init__()
        unset_hf_deepspeed_config()  # else models are loaded empty under ZeRO-3
        if isinstance(self.reward_model_path, list) and len(self.reward_model_path) == 1:
            (self.reward_model_path,) = self.reward_model_path  # as TRL's own config, and runs of it, have it
        if isinstance(self.stop_token_id, int):
            self.stop_token_id = [self.stop_token_id]  # as TRL's own config takes it
        if self.stop_token_id is not None:
            self.stop_token = None  # a given id replaces the default
        if getattr(self, "metric_for_best_model", None) in (
            "loss",
            "eval_loss",
        ):  # transformers' default; PPO has no evaluation loss
            self.metric_for_best_model, self.greater_is_better = "score", True
        local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local_batch_size % self.num_mini_batches:
            raise InputError(
                f"--num_mini_batches {self.num_mini_batches}: must divide per_device_train_batch_size × "
                f"gradient_accumulation_steps = {local_batch_size}."
            )
        if self.kl_estimator != "k1":
            raise InputError("--kl_estimator k3: as a reward it hardly restrains the KL. Use k1.")
        if "epoch" in (self.save_strategy, self.logging_strategy, self.eval_strategy):
            raise InputError(
                "--save_strategy, --logging_strategy and --eval_strategy: PPO has steps, not epochs. Use 'steps' or "
                "'no'."
            )
        for name, value in UNUSED.items():
            if getattr(self, name) != value:
                raise InputError(f"--{name}: has no effect in PPO. Leave it out.")
        if self.value_model_path is not None and not value_file(self.value_model_path).is_file():
            raise InputError(
                f"--value_model_path {self.value_model_path}: has no {VALUE_FILE}. Give the output folder of a "
                "finished PPO run."
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise InputError("--missing_eos_penalty and --missing_eos_score: give one of them.")


def value_file(folder: str) -> Path:
    """The value function of the PPO run in a folder."""
    return Path(folder).expanduser() / VALUE_FILE


def check_stop_tokens(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a stop token that no reply can have.

    Raises:
        InputError: naming the token id.
    """
    for token in args.stop_token_id or []:
        if token >= len(tokenizer):
            raise InputError(
                f"--stop_token_id {token}: the tokenizer has {len(tokenizer)} tokens, 0 to {len(tokenizer) - 1}."
            )
