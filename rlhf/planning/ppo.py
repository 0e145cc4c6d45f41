"""The passes of PPO: sampling, scoring, log-probabilities and the update, on full rows of one length.

Where the real passes read numbers (which rows have ended, how long the longest is), these take the longest.
"""

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from trl import ModelConfig

from rlhf.models.adapters import REFERENCE, REWARD, active_adapter, trunk
from rlhf.models.generation import draw_tokens
from rlhf.models.logprobs import Entropy, frozen_head, logprobs_behind, token_logprobs
from rlhf.models.prefix import WORTH_IT, before_head, forward_behind_prefix, take
from rlhf.models.sources import Source
from rlhf.planning.launch import Launch
from rlhf.planning.models import Model, policy_model, scoring_model
from rlhf.planning.stage import Stage
from rlhf.planning.trace import CACHE, Trace
from rlhf.planning.training import finish_step, rows_of_ones
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.model import PolicyAndValue, TokenOutputs
from rlhf.ppo.setup import policy_and_value
from rlhf.ppo.update import UpdateSettings, ppo_loss
from rlhf.rewards.sources import RewardSource


class PPOModels(NamedTuple):
    """What PPO has in memory, on the meta device."""

    trained: PolicyAndValue
    reference: Model | None  # a model of its own
    rewards: list[Model | str]  # the name of an adapter of the policy
    others: list[Model | str]  # of --eval_reward_funcs


def ppo_models(
    source: Source,
    start: Source,
    rewards: list[RewardSource],
    eval_rewards: list[RewardSource],
    args: PPOConfig,
    model_args: ModelConfig,
    launch: Launch,
    layers: int | None = None,
) -> PPOModels:
    """The models that recipes/ppo.py would load, with fewer layers if `layers` says so."""
    policy = policy_model(source, start, model_args, launch.on_cpu, layers)
    scoring, others = (
        [scoring_model(policy, found.model, model_args, launch.on_cpu, layers) for found in sources if found.model]
        for sources in (rewards, eval_rewards)
    )
    reference = None if isinstance(policy, PeftModel) else copy.deepcopy(policy).requires_grad_(False)
    adapter = policy.active_adapter if isinstance(policy, PeftModel) else "default"
    return PPOModels(policy_and_value(policy, None, adapter, args, REWARD in scoring), reference, scoring, others)


class PPOPasses:
    """The passes of PPO on a stage.

    Args:
        models: as they are on the stage.
        shared: length of the prefix that all prompts share.
    """

    def __init__(self, stage: Stage, models: PPOModels, args: PPOConfig, shared: int = 0) -> None:
        self.stage, self.models, self.args, self.shared = stage, models, args, shared
        self.policy: Any = models.trained.policy

    def casts(self) -> Any:
        """PEFT without casts of layers' inputs where autocast undoes them, as in rlhf/models/precision.py."""
        undone = isinstance(self.policy, PeftModel) and self.stage.launch.mixed is not None
        return disable_input_dtype_casting(self.policy, active=undone)

    # ------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def prompts(self, trace: Trace, rows: int, prompt: int) -> DynamicCache:
        """Fill the cache with prompts and draw the first token."""
        cache = DynamicCache(config=self.policy.config.get_text_config(decoder=True))
        self.policy.eval()
        with self.stage.autocast(), self.casts():
            logits = (
                self.policy(**rows_of_ones(rows, prompt), past_key_values=cache, use_cache=True, logits_to_keep=1)
                .logits[:, -1]
                .float()
            )
            logits = logits / self.args.temperature  # and gives up the first ones
            draw_tokens(logits, True, torch.zeros(rows))
        mark_cache(trace, cache)
        return cache

    @torch.no_grad()
    def next_token(self, trace: Trace, cache: DynamicCache, rows: int, before: int) -> None:
        """One more token behind `before` tokens."""
        for layer in cache.layers:
            if layer.is_initialized and layer.keys.shape[2] != before:  # not a window
                layer.keys, layer.values = (
                    torch.empty(states.shape[0], states.shape[1], before, states.shape[3], dtype=states.dtype)
                    for states in (layer.keys, layer.values)
                )
        mark_cache(trace, cache)
        mask = torch.ones(rows, before + 1, dtype=torch.long)
        with self.stage.autocast(), self.casts():
            logits = self.policy(
                input_ids=torch.ones(rows, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache,
                use_cache=True,
            ).logits[:, -1].float()  # fmt: skip
            logits = logits / self.args.temperature  # and gives up the first ones
            draw_tokens(logits, True, torch.zeros(rows))
        mark_cache(trace, cache)

    def sample(self, trace: Trace, rows: int, prompt: int) -> None:
        """The first and the last token of replies; those between need less memory."""
        cache = self.prompts(trace, rows, prompt)
        self.next_token(trace, cache, rows, prompt + self.args.response_length - 1)

    # ------------------------------------------------------------------------------------------ other passes

    @torch.no_grad()
    def score(self, rows: int, tokens: int) -> None:
        """Every reward model once."""
        for model in self.models.rewards:
            if not isinstance(model, str):
                self.forward(trunk(model), rows, tokens)
            else:
                with active_adapter(self.policy, model):
                    self.forward(trunk(self.policy), rows, tokens)

    @torch.no_grad()
    def logprobs(self, rows: int, tokens: int) -> None:
        """Log-probabilities and values of the policy, and the reference's log-probabilities."""
        self.models.trained.eval()
        states = self.value_states()
        with self.stage.autocast(), self.casts():
            kept = self.outputs(rows, tokens, "none")
            if self.models.reference is not None:
                self.completion_logprobs(self.models.reference, rows, tokens, "none")
            else:
                name = REFERENCE if REFERENCE in self.policy.peft_config else None
                with active_adapter(self.policy, name):
                    self.completion_logprobs(self.policy, rows, tokens, "none")
            del kept, states

    def value_states(self) -> torch.Tensor | None:
        """What a head on the reward adapter reads, of the whole batch of this process: kept until the next rollout."""
        if self.models.trained.value_adapter != REWARD:
            return None
        local = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        width = self.policy.config.get_text_config().hidden_size
        dtype = self.stage.launch.mixed or self.policy.dtype
        return torch.zeros(local, self.args.response_length, width, dtype=dtype)

    def outputs(self, rows: int, tokens: int, entropy: Entropy) -> TokenOutputs:
        """What PolicyAndValue.forward returns."""
        trained, length = self.models.trained, self.args.response_length
        logprobs, entropies, hidden = self.completion_logprobs(self.policy, rows, tokens, entropy)
        if trained.value_adapter == REWARD and torch.is_grad_enabled():  # read before the update
            width = self.policy.config.get_text_config().hidden_size
            hidden = torch.zeros(rows, length, width, dtype=hidden.dtype)
        elif trained.value_adapter is not None:
            with active_adapter(self.policy, trained.value_adapter):
                states = self.forward(trunk(self.policy), rows, tokens)[0]
            hidden = take(states, torch.zeros(rows, length, dtype=torch.long))
        with torch.autocast("cpu", enabled=False):
            values = trained.value_head(hidden.float()).squeeze(-1)
        return TokenOutputs(logprobs, entropies, values)

    def completion_logprobs(
        self, model: Any, rows: int, tokens: int, entropy: Entropy
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropy (B, T) of replies, and the hidden states before them (B, T, d)."""
        length, caught = self.args.response_length, []
        in_step = self.stage.launch.sharded and torch.is_grad_enabled()
        head = None if entropy == "graph" or in_step else frozen_head(model)

        def choose(hidden: torch.Tensor) -> torch.Tensor:
            if len(hidden) < rows:  # the shared prefix
                return hidden[:, :0]
            caught.append(take(hidden, torch.zeros(rows, length, dtype=torch.long)))
            return hidden[:, :0] if head is not None else caught[-1].reshape(1, rows * length, -1).clone()

        with before_head(model, choose):
            logits = self.forward(model, rows, tokens).logits[0]
        replies, temperature = torch.ones(rows * length, dtype=torch.long), self.args.temperature
        if head is None:
            found = token_logprobs(logits, replies, temperature, entropy)
        else:
            states = caught[-1].reshape(rows * length, -1)
            found = logprobs_behind(head, states, replies, temperature, entropy)
        return found[0].view(rows, length), found[1].view(rows, length), caught[-1]

    def forward(self, model: Any, rows: int, tokens: int) -> Any:
        """The output for full rows, whose shared prefix is computed once where the real passes do so."""
        body, inputs = trunk(model) if isinstance(model, PeftModel) else model, rows_of_ones(rows, tokens)
        config = self.policy.config.get_text_config(decoder=True)
        checkpointed = body.is_activation_checkpointing and torch.is_grad_enabled()
        in_step = self.stage.launch.sharded and torch.is_grad_enabled()
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        if checkpointed or in_step or not plain or self.shared * (rows - 1) < WORTH_IT:
            return model(**inputs, use_cache=False)
        return forward_behind_prefix(model, config, inputs["input_ids"], inputs["attention_mask"], self.shared)

    def backward(self, rows: int, tokens: int) -> None:
        """Forward and backward pass of a microbatch."""
        shape = (rows, self.args.response_length)
        self.models.trained.train()
        with self.casts():
            with self.stage.autocast():
                new = self.outputs(rows, tokens, "graph" if self.args.entropy_coef > 0 else "value")
            old_logprobs, old_values, advantages, returns = (torch.zeros(shape) for _ in range(4))
            mask = torch.ones(shape, dtype=torch.bool)
            given = (old_logprobs, old_values, advantages, returns)
            ppo_loss(new, *given, mask, UpdateSettings.of(self.args, warming_up=False)).loss.backward()

    def step(self, rows: int, tokens: int, micro_batches: int) -> None:
        """An optimizer step on two microbatches, if there are several, or one."""
        states = self.value_states()
        for _ in range(min(2, micro_batches)):
            self.backward(rows, tokens)
        del states
        finish_step(self.stage, self.args.max_grad_norm)


def mark_cache(trace: Trace, cache: DynamicCache) -> None:
    """Tell keys and values from other activations."""
    for layer in cache.layers:
        trace.mark([getattr(layer, "keys", None), getattr(layer, "values", None)], CACHE)


def on_stage(models: PPOModels, args: PPOConfig, launch: Launch) -> Stage:
    """The models of a PPO run as fake tensors."""
    beside: list[nn.Module] = [model for model in [*models.rewards, *models.others] if not isinstance(model, str)]
    split: list[nn.Module] = [models.trained.policy, *([] if models.reference is None else [models.reference])]
    vocabulary = models.trained.config.get_text_config().vocab_size
    return Stage(models.trained, split, beside, vocabulary, args, launch)
