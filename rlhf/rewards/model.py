"""A trained reward model as a reward function."""

from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.comparisons import Messages, Prompt
from rlhf.data.encoding import continued, encode_scored, encode_text_with_end, options_of_rows
from rlhf.data.pairs import Encoded, encode_pair
from rlhf.data.rendering import TemplateOptions
from rlhf.models.adapters import active_adapter, trunk
from rlhf.models.padding import pad_neutrally, reads_the_last_token
from rlhf.models.prefix import Rows, forward_sharing_prefix
from rlhf.models.sources import reads_pairs, usable_context
from rlhf.rewards.answers import Completion, completion_text


class RewardModel:
    """A trained reward model as a reward function, with its own tokenizer and chat template.

    It scores texts, so the policy's tokenizer doesn't matter. A decoder reads a conversation as its chat template
    renders it, to the end (the template of one trained here ends with the token that ends the reply);
    an encoder without a template reads prompt and reply as a pair (rlhf/data/pairs.py). A completion is scored as a
    finished reply, without the tokens after the stop token. If prompt and reply exceed the model's context, the
    beginning of the prompt is cut off; that is printed once.

    Args:
        model: a sequence classifier with one output, or with two labels (see `one_score`). Or the policy, together with
            `adapter` and `head`: the reward model is then an adapter and a head over the policy's own base, and no
            second base is in memory.
        adapter: the name of the policy's adapter that scores.
        head: from the last hidden state (…, d) to the score (…, 1).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        name: str = "reward_model",
        adapter: str | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.__name__ = model, tokenizer, batch_size, name
        self.adapter, self.head = adapter, head
        self.longest, self._cut_something = usable_context(model.config), False
        self.pairs = head is None and reads_pairs(tokenizer, model.config)
        if adapter is None:
            model.eval().requires_grad_(False)

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """Token ids of a prompt and a completion. A decoder's end with the token at which the score is read."""
        return self.features(prompt, completion)["input_ids"]

    def features(self, prompt: Prompt, completion: str, options: TemplateOptions | None = None) -> Encoded:
        """A prompt and a completion as the model reads them: `input_ids`, and `token_type_ids` if it has them."""
        if self.pairs:
            whole = encode_pair(self.tokenizer, prompt, completion)
        elif isinstance(prompt, str):
            whole = {"input_ids": encode_text_with_end(self.tokenizer, prompt, completion)}
        else:
            reply: Messages = [{"role": "assistant", "content": completion}]
            whole = {"input_ids": encode_scored(self.tokenizer, continued(prompt, reply), options)}
        ids = whole["input_ids"]
        if self.longest is None or len(ids) <= self.longest:
            return whole
        if not self._cut_something:
            print(f"{self.__name__}: {len(ids)} tokens of prompt and reply are more than the reward model's context of "
                  f"{self.longest}: it sees the end of such prompts only.")  # fmt: skip
            self._cut_something = True
        if self.pairs:
            return encode_pair(self.tokenizer, prompt, completion, self.longest)
        # the first token is where an encoder reads its score
        return {"input_ids": [ids[0], *ids[len(ids) - self.longest + 1 :]]}

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Completion], **columns: object) -> list[float]:
        """One score per completion. The columns `tools` and `chat_template_kwargs` go to the chat template."""
        texts = [completion_text(completion) for completion in completions]
        options = options_of_rows(columns, len(prompts))
        rows = [self.features(*parts) for parts in zip(prompts, texts, options, strict=True)]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        scores = [0.0] * len(rows)
        if not self._reads_the_last_token():
            pad_neutrally(self._classifier())
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            for number, score in zip(numbers, self._padded_scores([rows[n] for n in numbers]), strict=True):
                scores[number] = score
        return scores

    def _padded_scores(self, rows: list[Encoded]) -> list[float]:
        batch = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self.model.device)
        return self._scores(**batch).tolist()

    def _classifier(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _reads_the_last_token(self) -> bool:
        return self.head is not None or (reads_the_last_token(self._classifier()) and not self.pairs)

    def _scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """Scores (B,) float32."""
        self.model.eval()
        if not self._reads_the_last_token():
            return one_score(self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits)
        body = trunk(self.model)
        # the id of a pad token may lie outside of the embeddings; masked positions can have any id
        ids = input_ids.masked_fill(attention_mask == 0, 0)
        with nullcontext() if self.adapter is None else active_adapter(self.model, self.adapter):
            nothing = torch.zeros_like(attention_mask[:, 0])
            computed = forward_sharing_prefix(body, body.config, Rows(ids, attention_mask, nothing))
        hidden = computed.at(computed.output[0], attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        if self.head is None:
            return one_score(self._classifier().score(hidden))
        return self.head.to(hidden.device)(hidden.float())[:, 0]


def one_score(logits: torch.Tensor) -> torch.Tensor:
    """Scores (B,) float32 of a classifier's logits: its one output, or of two labels the log-odds of the second.

    >>> one_score(torch.tensor([[1.5], [0.0]])).tolist(), one_score(torch.tensor([[0.5, 2.0]])).tolist()
    ([1.5, 0.0], [1.5])

    The softmax of two logits a, b is the logistic function of b - a, so b - a is a Bradley-Terry model's score.
    """
    logits = logits.float()
    return logits[:, 0] if logits.shape[-1] == 1 else logits[:, 1] - logits[:, 0]
