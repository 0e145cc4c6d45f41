"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) over this project's models and tasks.

The harness builds prompts, draws examples and scores answers. What is ours: models come from rlhf/models.py, and
log-likelihoods are computed with less work and more precision than by its `HFLM`:

- what the prompts of a batch begin with, such as the examples, runs once (rlhf/prefix.py);
- logits are computed where an answer stands, not at every token: with 49,152 words, log-probabilities of all positions
  take as long as the model itself;
- the head multiplies in float32. In bfloat16, logits near 20 are 0.125 apart, and answers tie that are not equal.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.samplers import ContextSampler
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.intervals import difference, interval
from rlhf.data import write_jsonl
from rlhf.prefix import forward

TASK_FOLDER = Path(__file__).parent / "tasks"
SAME_EXAMPLES = 10  # documents in a row that get the same examples
Request = tuple[Any, list[int], list[int]]  # (texts, context ids, continuation ids)


class SharedExamples(ContextSampler):
    """Draws the same examples for SAME_EXAMPLES documents in a row, so that they are computed once.

    The first examples of a longer draw are those of a shorter one: with more examples a prompt only grows.
    """

    def set_rnd(self, rnd: int | None) -> "SharedExamples":
        self.seed, self.calls = rnd, 0
        return self

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Sequence[dict[str, Any]]:
        group, self.calls = self.calls // SAME_EXAMPLES, self.calls + 1
        docs = [doc for doc in self.fewshot_docs() if doc != eval_doc]
        random.Random(f"{self.seed} {group}").shuffle(docs)
        return docs[:n]


def sharpen_head(model: PreTrainedModel) -> None:
    """Let the output head compute in float32 with weights of its own, also where it shares them with the embeddings."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype != torch.float32:
        head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
        head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].float(),))


class SharedPrefixLM(HFLM):
    """HFLM whose log-likelihoods are computed as said above; generation is HFLM's own."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        sharpen_head(model)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding would have said it) of each request.

        Requests that differ in their last token alone are read off the same logits.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            ids = tuple((context + continuation)[-(self.max_length + 1) : -1])
            rows.setdefault(ids, []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods")
        for batch in self._batches(list(rows), override_bs or self.batch_size):
            longest = [max(len(requests[number][2]) for number in rows[ids]) for ids in batch]
            for ids, logprobs in zip(batch, self._logprobs(batch, longest), strict=True):
                for number in rows[ids]:
                    answers[number] = self._read_off(logprobs, requests[number][2])
                    progress.update()
        progress.close()
        return [answers[number] for number in range(len(requests))]

    @staticmethod
    def _batches(rows: list[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
        """Rows of equal beginnings together, of similar lengths beside each other."""
        beginnings: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for row in rows:
            beginnings.setdefault(row[:64], []).append(row)
        alone = [row for group in beginnings.values() if len(group) < size // 2 for row in group]
        groups = [group for group in beginnings.values() if len(group) >= size // 2] + [alone]
        batches = []
        for group in groups:
            group.sort(key=len, reverse=True)
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        return batches

    @torch.no_grad()
    def _logprobs(self, batch: list[tuple[int, ...]], longest: list[int]) -> list[torch.Tensor]:
        """Log-probabilities (n, V), float32, of what follows the last n = `longest` tokens of each row."""
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        width = int(lengths.max())
        mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        padded = [[0] * (width - len(ids)) + list(ids) for ids in batch]
        contexts = lengths - torch.tensor(longest, device=self.device) + 1
        computed = forward(
            self.model, self.model.config.get_text_config(), torch.tensor(padded, device=self.device), mask, contexts,
            logits_to_keep=max(longest),
        )  # fmt: skip
        logits = computed.output.logits.float()
        return [row[-n:].log_softmax(-1) for row, n in zip(logits, longest, strict=True)]

    @staticmethod
    def _read_off(logprobs: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        logprobs = logprobs[-len(continuation) :]
        ids = torch.tensor(continuation, device=logprobs.device)
        return float(logprobs.gather(1, ids[:, None]).sum()), bool((logprobs.argmax(-1) == ids).all())


# ---------------------------------------------------------------------------------------------- tasks and results


def write_task(name: str, rows: dict[str, list[dict[str, Any]]], folder: Path, output_type: str) -> dict[str, Any]:
    """Write a task's rows into the folder, and return its lm-eval configuration: eval/tasks/<output_type>.yaml.

    Args:
        rows: `train`, which examples are drawn from, and `test`, as rlhf.instructions.worded gives them.
    """
    files = {split: str(folder / f"{name}.{split}.jsonl") for split in rows}
    for split, file in files.items():
        write_jsonl(Path(file), rows[split])
    config = yaml.safe_load((TASK_FOLDER / f"{output_type}.yaml").read_text(encoding="utf-8"))
    return {**config, "task": name, "dataset_kwargs": {"data_files": files}, "fewshot_config": {
        "sampler": SharedExamples, "split": "train"}}  # fmt: skip


def score_of(sample: dict[str, Any]) -> float:
    """The first metric of a sample that lm-eval logged."""
    return float(sample[sample["metrics"][0]])


def summarize(scores: dict[int, dict[str, list[float]]], seed: int) -> dict[str, Any]:
    """Means with intervals, and what the most examples change against none.

    Args:
        scores: by number of examples and task, one per document.

    Returns:
        `tasks.<task>.<number of examples>` and `differences.<task>`, each {mean, low, high, n}.
    """
    cells = {k: {task: interval(values, seed=seed) for task, values in tasks.items()} for k, tasks in scores.items()}
    most, least = max(cells), min(cells)
    return {
        "tasks": {
            task: {str(k): {key: cells[k][task][key] for key in ("mean", "low", "high", "n")} for k in sorted(cells)}
            for task in cells[least]
        },
        "differences": {
            task: difference(cells[most][task], cells[least][task], seed=seed) for task in cells[least] if most > least
        },
    }
