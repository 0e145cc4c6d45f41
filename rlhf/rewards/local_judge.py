"""A judge in this process, read by the probabilities of its answers: there is no text that could fail to be parsed."""

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.data.encoding import encode_prompt, encode_text, is_seq2seq
from rlhf.errors import InputError
from rlhf.models.adapters import active_adapter, why_alone
from rlhf.models.loading import load_causal_lm, place
from rlhf.models.prefix import logits_at
from rlhf.models.seq2seq import generation_inputs
from rlhf.models.sources import Source, base_config, base_revision, usable_context
from rlhf.models.tokenizers import load_tokenizer


class LocalJudge:
    """A language model that is asked questions, and read by the probabilities of single-token answers.

    Args:
        model: a language model. A PeftModel judges with its adapters off: it is the policy on the judge's base.
        name: for errors and progress bars.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, name: str
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.name = model, tokenizer, batch_size, name
        self.room = usable_context(model.config)
        self.said = False

    def encode(self, question: str, answer: str) -> list[int]:
        """Token ids of a question and an answer. No text in them becomes a control token.

        The answer is begun for the judge, so that a small model, or one that would think first, gives it at once. An
        encoder reads the question alone.
        """
        begun = f"Answer: {answer}"
        if is_seq2seq(self.tokenizer):
            return self.tokenizer(f"{question}\nAnswer:", split_special_tokens=True)["input_ids"]
        if self.tokenizer.chat_template is None:
            return encode_text(self.tokenizer, f"{question}\n{begun}", split_special_tokens=True)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": begun}]
        return encode_prompt(self.tokenizer, messages)

    def answer_ids(self, options: tuple[str, ...]) -> list[int]:
        """The one token in which answers differ, of each of the options.

        Raises:
            InputError: if they differ in more.
        """
        if is_seq2seq(self.tokenizer):
            rows = [self.tokenizer(text_target=option, add_special_tokens=False)["input_ids"] for option in options]
        else:
            rows = [self.encode("?", option) for option in options]
        if len({tuple(row[:-1]) for row in rows}) > 1 or (is_seq2seq(self.tokenizer) and len(rows[0]) > 1):
            raise InputError(f"--judge_model_name_or_path {self.name}: its tokenizer has no one token for each of the "
                             f"answers {', '.join(options)}. Use another model, or one on a server.")  # fmt: skip
        return [row[-1] for row in rows]

    @torch.no_grad()
    def answers(self, questions: list[str], options: tuple[str, ...]) -> list[list[float]]:
        """P(each of the options) as the answer to each question; zeros for a question longer than the context."""
        asked = [self.encode(question, options[0]) for question in questions]
        rows = asked if is_seq2seq(self.tokenizer) else [row[:-1] for row in asked]
        ids = self.answer_ids(options)
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        starts = range(0, len(order), self.batch_size)
        found = [[0.0] * len(options)] * len(rows)
        for start in tqdm(starts, desc=self.name, unit="batch", disable=len(starts) < 20):
            numbers = order[start : start + self.batch_size]
            probabilities = self._next_token([self._cut(rows[number]) for number in numbers])
            for number, share in zip(numbers, probabilities[:, ids].tolist(), strict=True):
                # a question that was cut is asked nonetheless: under FSDP2 every process needs as many passes
                if self.room is None or len(rows[number]) <= self.room:
                    found[number] = share
        return found

    def _cut(self, row: list[int]) -> list[int]:
        if self.room is None or len(row) <= self.room:
            return row
        if not self.said:
            print(f"{self.name}: a question has {len(row)} tokens, the judge's context {self.room}. Such replies have "
                  "no score.")  # fmt: skip
            self.said = True
        return row[-self.room :]

    def _next_token(self, rows: list[list[int]]) -> torch.Tensor:
        """Probabilities (B, V) float32 of the token after each row."""
        shared = isinstance(self.model, PeftModel)
        model: Any = self.model.get_base_model() if shared else self.model
        side = "left" if model.config.is_encoder_decoder else "right"
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt").to(model.device)
        with active_adapter(self.model, None) if shared else nullcontext():
            if model.config.is_encoder_decoder:
                inputs, _ = generation_inputs(model, batch, model.generation_config)
                return model(**inputs).logits[:, -1].float().softmax(-1)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            # the id of a pad token may lie outside of the embeddings; masked positions can have any id
            inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "use_cache": False}
            return logits_at(model, mask.sum(1, keepdim=True) - 1, **inputs).logits[:, 0].float().softmax(-1)


def load_judge(
    source: Source, model_args: ModelConfig, policy: PreTrainedModel | PeftModel | None = None, batch_size: int = 16
) -> LocalJudge:
    """The judge of a source, over the policy's base if that is the judge."""
    tokenizer = load_tokenizer(source)
    if isinstance(policy, PeftModel) and is_base_of(policy, source):
        return LocalJudge(policy, tokenizer, batch_size, source.name)
    model = place(load_causal_lm(source, model_args, tokenizer, trainable=False))
    return LocalJudge(model, tokenizer, batch_size, source.name)


def is_base_of(policy: PeftModel, source: Source) -> bool:
    """Whether a model is the policy with its adapters off."""
    base = policy.get_base_model()
    rows = base.get_input_embeddings().weight.shape[0]
    return (
        source.adapter is None
        and source.base == base.name_or_path
        and not any(why_alone(config) for config in policy.peft_config.values())
        and policy.peft_config[policy.active_adapter].revision == base_revision(source)
        and rows == base_config(source).get_text_config().vocab_size
    )
