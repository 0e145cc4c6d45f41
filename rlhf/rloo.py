"""RLOO: REINFORCE with a leave-one-out baseline, TRL's RLOOTrainer with the rewards, prompts and sampling of PPO.

The algorithm is TRL's: of G completions of a prompt, each has the mean reward of the other G - 1 as its baseline, and
the whole completion is one action (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.2). No value
function is trained. The KL to the reference is subtracted from the reward of the completion.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput
from trl import ModelConfig
from trl import RLOOConfig as TRLRLOOConfig
from trl import RLOOTrainer as TRLRLOOTrainer
from trl.trainer.utils import get_config_model_id

from rlhf.comparisons import Prompt, as_message
from rlhf.data.datasets import Row
from rlhf.data.encoding import OPTION_COLUMNS, encode_prompt, options_of_rows
from rlhf.data.rendering import TemplateOptions
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import InputError
from rlhf.models.adapters import disable_dropout, why_alone
from rlhf.models.causality import need_causal
from rlhf.models.generation import Sampling, generate, left_pad
from rlhf.models.logprobs import token_logprobs
from rlhf.models.precision import mixed_precision
from rlhf.models.prefix import logits_at, without_gaps
from rlhf.models.seq2seq import decoder_outputs
from rlhf.models.tokenizers import end_ids, reply_text
from rlhf.rewards import (
    Completion,
    JudgeArguments,
    RewardArgument,
    RewardLog,
    call_rewards,
    gathered_means,
    need_scores,
    reward_functions,
    reward_names,
    with_own,
)
from rlhf.run.ranges import check_ranges
from rlhf.run.trainers import WholeCheckpoints


@dataclass
class RLOOConfig(SamplerArguments, JudgeArguments, TRLRLOOConfig):
    """TRL's RLOOConfig with the rewards of PPOConfig, and with the engines of the commands that only sample.

    Args:
        reward_model_path: an adapter or full model that scores, by path or Hub id, or `starter`: the starter's scorer.
        reward_funcs: import paths of functions, reward models, or `judge` (see `JudgeArguments`).
        disable_dropout: defaults to True, as PPO does: with dropout the ratio of new to old probabilities would not
            start at 1.
    """

    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model: adapter or full model, folder or Hub id; or 'starter', its scorer."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: import paths of functions (package.module.function), reward models, 'judge' or 'starter'."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout in the policy and the reference."})

    def __post_init__(self) -> None:
        check_ranges(self)  # first: TRL divides by some of them
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, the default
        super().__post_init__()
        self._check_engine()
        accumulated = self.gradient_accumulation_steps
        apart = math.lcm(self.passes_per_batch, accumulated) // accumulated
        if self.save_strategy == "steps" and self.save_steps % apart:
            raise InputError(
                f"--save_steps {self.save_steps}: a run resumes only between batches of samples, which are {apart} "
                "updates apart (steps_per_generation × num_iterations / gradient_accumulation_steps). Give a multiple "
                f"of {apart}."
            )

    def _check_engine(self) -> None:
        """Refuse what the engines don't do.

        Raises:
            InputError: for other settings of sampling than the temperature.
        """
        if not (self.use_vllm or self.use_transformers_continuous_batching):
            return
        plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
        for name, default in plain.items():
            if getattr(self, name) not in (default, {}):
                raise InputError(f"--{name}: has no effect with {self.sampler_flag}, which samples from the whole "
                                 "distribution. Leave one of them out.")  # fmt: skip

    @property
    def passes_per_batch(self) -> int:
        """How many forward and backward passes are made with one batch of samples."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations


def need_prompts(dataset: Dataset, name: str, args: RLOOConfig) -> None:
    """Refuse a dataset that doesn't fill one batch. TRL's sampler would drop it as an incomplete batch.

    Raises:
        InputError: if there are fewer prompts than `generation_batch_size / num_generations`.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    needed = args.generation_batch_size // args.num_generations
    if len(dataset) < needed:
        raise InputError(
            f"--dataset_name {name}: {len(dataset)} prompts; a batch of {args.generation_batch_size} completions, "
            f"{args.num_generations} of each, takes {needed}. Give more, or lower --per_device_train_batch_size."
        )


class RLOOTrainer(WholeCheckpoints, TRLRLOOTrainer):
    """TRL's RLOOTrainer; each method's docstring names the difference.

    With a PeftModel the reference is `ref`, a frozen copy of the SFT adapter that the trainer makes at its start. The
    log has two more entries: `objective/kl`, the KL to the reference in nats summed over a completion (TRL's own `kl`
    is a mean over tokens), and `episode`, the number of completions sampled so far.
    """

    # narrower than TRL declares them
    args: RLOOConfig
    accelerator: Accelerator
    generation_config: GenerationConfig
    _options: list[TemplateOptions] | None = None  # of the rows at hand

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardArgument | list[RewardArgument],
        args: RLOOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        **arguments: object,
    ) -> None:
        """TRL's parameters in TRL's order; `reward_funcs` may also be names of functions. Later ones go by name.

        Raises:
            InputError: if `args` is of another class, or a reward can't be used.
        """
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RLOOConfig(f"{Path(name).name}-RLOO")
        if not isinstance(args, RLOOConfig):
            raise InputError(
                f"args: give an rlhf.rloo.RLOOConfig; found {type(args).__module__}.{type(args).__name__}."
            )
        for why in filter(None, map(why_alone, model.peft_config.values() if isinstance(model, PeftModel) else ())):
            raise InputError(f"model: the reference uses the policy's base, and the policy is an adapter: {why}")
        functions = reward_functions(
            reward_funcs, "reward_funcs", ModelConfig(dtype="float32"), tokenizers=reward_processing_classes,
            policy=None if isinstance(model, str) else model, columns=getattr(train_dataset, "column_names", None),
            batch_size=args.per_device_eval_batch_size, trust_remote_code=args.trust_remote_code, judge=args,
        )  # fmt: skip
        if args.beta and not isinstance(model, PeftModel | str):
            # TRL then loads the reference from the policy's name: in the same precision and revision
            commit = getattr(model.config, "_commit_hash", None)  # of a model from the Hub
            args.model_init_kwargs = {"dtype": model.dtype, **({"revision": commit} if commit else {})}
        # TRL would make its own engine, which sends merged weights over NCCL
        chosen = (args.use_vllm, args.use_transformers_continuous_batching)
        args.use_vllm = args.use_transformers_continuous_batching = False
        super().__init__(
            model=model, reward_funcs=functions, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, **arguments,
        )  # fmt: skip
        args.use_vllm, args.use_transformers_continuous_batching = chosen
        self.reward_func_names = reward_names(functions)
        self._noted: dict[str, list[float]] = {}  # what reward functions log in training
        self._noted_in_evaluation: dict[str, list[float]] = {}
        self.processing_class.is_encoder_decoder = self.model.config.is_encoder_decoder  # for encode_prompt
        need_causal(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model, "model")
        # TRL's own has the tokenizer's eos alone
        self.generation_config.eos_token_id = self.ends = end_ids(self.model, self.processing_class)
        self.sampler = self._make_sampler()
        if args.mask_truncated_completions and len(self.ends) > 1:
            raise InputError(
                f"--mask_truncated_completions true: TRL takes a completion for truncated unless it ends with token "
                f"{self.processing_class.eos_token_id}, and this model ends with one of {self.ends[:5]}. Leave it off, "
                "or keep one eos_token_id in generation_config.json."
            )
        if args.disable_dropout:
            for module in (self.model, self.ref_model):
                if module is not None:
                    disable_dropout(module)

    def _make_sampler(self) -> Callable[..., list[list[list[int]]]] | None:
        """The engine that the flags choose, if it isn't the project's own loop.

        Raises:
            InputError: if it can't be used.
        """
        args = self.args
        chosen = args.use_vllm or args.use_transformers_continuous_batching
        if chosen and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise InputError(f"{args.sampler_flag}: RLOO has not been run with it under FSDP2 or DeepSpeed. Leave it "
                             "out, or launch with DDP.")  # fmt: skip
        return make_sampler(args, args.output_dir, [], trains=True)

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], None, dict[str, object]]:
        """As in the other recipes: a control token inside a message stays text, and a row may have its own tools."""
        pairs = zip(prompts, self._options or [TemplateOptions()] * len(prompts), strict=True)
        return [encode_prompt(self.processing_class, prompt, options) for prompt, options in pairs], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: object, multimodal_fields: object
    ) -> list[list[int]]:
        """Sample with the engine of PPO, without dropout; TRL samples where weights are spread."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        policy, training, args = self.accelerator.unwrap_model(self.model), self.model.training, self.args
        self.model.eval()
        if self.sampler:
            size, seed = args.per_device_train_batch_size, int(torch.randint(2**31, ()))
            sampling = Sampling(args.max_completion_length, args.temperature, size, seed)
            drawn = self.sampler(policy, self.processing_class, prompt_ids, sampling, True, 1)
            self.model.train(training)
            return [row for (row,) in drawn]
        batch = left_pad(self.processing_class, prompt_ids).to(self.accelerator.device)
        with torch.no_grad(), mixed_precision(self.accelerator, policy):
            samples = generate(policy, batch, self.generation_config)
        self.model.train(training)
        completions = samples.sequences[:, batch["input_ids"].shape[1] :].tolist()
        return [row[:length] for row, length in zip(completions, samples.lengths.tolist(), strict=True)]

    def _generate(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]], list[Completion]]:
        """Texts without any of the tokens that end them, and the log of what ended by all of these."""
        prompt_ids, completion_ids, completions = super()._generate(prompts)
        for number, ids in enumerate(completion_ids):
            if ids[-1] in self.ends and ids[-1] not in self.processing_class.all_special_ids:
                text = reply_text(self.processing_class, ids, self.ends)
                completions[number] = text if isinstance(completions[number], str) else as_message([], text)
        facts = torch.tensor([[len(ids), ids[-1] in self.ends] for ids in completion_ids])
        lengths, ended = self.accelerator.gather(facts.to(self.accelerator.device)).T
        finished = lengths[ended.bool()].float()
        finished = finished if len(finished) else torch.zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = 1 - ended.float().mean().item()
        for name, value in (("mean", finished.mean()), ("min", finished.min()), ("max", finished.max())):
            metrics[f"completions/{name}_terminated_length"][-1] = value.item()
        return prompt_ids, completion_ids, completions

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *inputs: Any, **settings: object
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """With rows padded on the right, where padding reaches nothing; some models read padding on the left.

        An encoder-decoder model gets the prompts and completions apart.
        """
        owner, keep = self.accelerator.unwrap_model(model), inputs[2]
        if owner.config.is_encoder_decoder:
            reads = functools.partial(_log_probs, functools.partial(_as_decoder, model, keep=keep), self.temperature)
            return super()._get_per_token_logps_and_entropies(reads, *inputs, **settings)

        def padded_right(
            input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int = keep + 1, **batch: object
        ) -> ModelOutput:
            width = input_ids.shape[1]
            starts = attention_mask.argmax(1, keepdim=True)
            columns = torch.arange(width, device=input_ids.device)
            moved = (columns + starts).clamp(max=width - 1)
            inside = columns + starts < width
            batch |= {
                "input_ids": input_ids.gather(1, moved),
                "attention_mask": attention_mask.gather(1, moved) * inside,
            }
            return logits_at(owner, (columns - starts).clamp(min=0)[:, -logits_to_keep:], model, **batch)

        reads = functools.partial(_log_probs, padded_right, self.temperature)
        return super()._get_per_token_logps_and_entropies(reads, *inputs, **settings)

    def _calculate_rewards(
        self,
        inputs: list[Row],
        prompts: list[Prompt],
        completions: list[Completion],
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        """Rewards (B over all processes, functions) from `call_rewards`, which refuses NaN.

        Rewards per token are summed. None (no opinion) becomes NaN. A completion with NaN only has no advantage.
        """
        training, log = self.model.training, RewardLog()
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        given = {"trainer_state": self.state, "log_extra": log.log_extra, "log_metric": log.log_metric}
        answers = call_rewards(self.reward_funcs, prompts, completions, completion_ids_list, **{**columns, **given})
        log.check(len(completions))
        self.model.train(training)  # a reward model that shares the policy's base has put it into evaluation mode
        totals = [
            [math.nan if score is None else math.fsum(score) if isinstance(score, list) else score for score in scores]
            for scores in answers
        ]
        rewards = self.accelerator.gather(torch.tensor(totals, device=self.accelerator.device).T.contiguous())
        need_scores(self.reward_funcs, int((~rewards.isnan()).any(1).sum()), len(rewards))
        self._note(log, len(completions))
        return rewards

    def _note(self, log: RewardLog, count: int) -> None:
        """Hand what the reward functions logged to TRL's log and table of completions.

        TRL's own hand-over waits for ever if a process logs a name that another one doesn't.

        Args:
            count: completions of this process.
        """
        noted = self._noted if self.model.training else self._noted_in_evaluation
        for name, value in gathered_means(log.means()).items():
            noted.setdefault(name, []).append(value)
        table, extra = self._logs["extra"], log.gathered_extra(count)
        before, rows = len(self._logs["prompt"]), count * self.accelerator.num_processes
        for column in {*table, *extra}:
            table[column].extend([None] * (before - len(table[column])))  # of batches that didn't log it
            table[column].extend(extra.get(column, [None] * rows))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the means of what the reward functions logged since the last line.

        Raises:
            InputError: if the trainer logs one of their names itself.
        """
        training = self.model.training
        noted = self._noted if training else self._noted_in_evaluation
        own = {name: sum(values) / len(values) for name, values in noted.items()}
        noted.clear()
        with_own({**logs, **self._metrics["train" if training else "eval"]}, own)
        logs.update({name if training else f"eval_{name}": mean for name, mean in own.items()})
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, object]:
        """With the two additional log entries, and with what each row gives to the chat template."""
        columns = {column: [row.get(column) for row in inputs] for column in OPTION_COLUMNS}
        self._options = [
            options._replace(variables={**self.chat_template_kwargs, **options.variables})
            for options in options_of_rows(columns, len(inputs))
        ]
        output = super()._generate_and_score_completions(inputs)
        self._options = None
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.beta:
            # TRL's mean over tokens times the mean length is the sum over a completion
            metrics["objective/kl"].append(metrics["kl"][-1] * metrics["completions/mean_length"][-1])
        if self.model.training:
            passes = self.state.global_step * self.args.gradient_accumulation_steps
            batches = passes // self.args.passes_per_batch + 1
            metrics["episode"] = [batches * self.args.generation_batch_size]
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save only the policy's adapter, not the reference or a reward adapter beside it."""
        if not isinstance(self.model, PeftModel):
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, selected_adapters=["default"])
            self.processing_class.save_pretrained(folder)


def _log_probs(
    read: Callable[..., ModelOutput],
    temperature: float,
    *,
    input_ids: torch.Tensor,
    fused_lm_head: bool = False,
    labels: torch.Tensor | None = None,
    **inputs: Any,
) -> ModelOutput:
    """What `read` returns; from TRL 1.15 on, which asks for it by `fused_lm_head`, log-probabilities and entropy."""
    output = read(input_ids=input_ids, **inputs)
    if not fused_lm_head:
        return output
    logits = output.logits[:, :-1]
    tokens = input_ids[:, -logits.shape[1] :]
    found = token_logprobs(logits.flatten(0, 1), tokens.flatten(), temperature)
    log_probs, entropy = (values.view(tokens.shape) for values in found)
    return ModelOutput(log_probs=log_probs, entropy=entropy, aux_loss=output.get("aux_loss"))


def _as_decoder(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, keep: int, **_: object
) -> ModelOutput:
    """The logits (B, `keep` + 1, V) of an encoder-decoder model where a decoder would have those of the last tokens.

    TRL cuts the last one off.

    Args:
        input_ids, attention_mask: (B, P + `keep`) prompts, padded on the left, and completions, padded on the right.
    """
    rows = without_gaps(input_ids, attention_mask, attention_mask[:, -keep:].sum(1))
    logits = decoder_outputs(model, rows).logits
    spread = logits.new_zeros(len(input_ids), keep + 1, logits.shape[-1])
    spread[:, :-1][attention_mask[:, -keep:].bool()] = logits
    return ModelOutput(logits=spread)
