"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) over this project's models and tasks.

The harness builds prompts, draws examples and scores answers. Two things are ours: models come from rlhf/models/, and
log-likelihoods are computed with less work and more precision than by its `HFLM`:

- a question runs once, not once for each answer, and the common beginning of a batch's questions, such as the examples,
  runs once for all of them (rlhf/models/prefix.py);
- logits are computed at the tokens of answers, not at every token: with a vocabulary of 49,152, log-probabilities of
  all positions take as long as the model itself;
- the head multiplies in float32. In bfloat16, logits near 20 are 0.125 apart, and different answers tie.
"""

import copy
import difflib
import functools
import inspect
import itertools
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.samplers import ContextSampler
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from eval.stats.intervals import Interval, JsonObject, interval
from rlhf.errors import InputError
from rlhf.models.generation import Way, way_to_decode
from rlhf.models.prefix import can_continue, logits_at, positions_of, prefill, rows_of
from rlhf.run.files import read_jsonl, write_jsonl
from rlhf.starter.tasks import TASKS

# lm-eval warns of a model that is already loaded and of a set number of examples; both are intended
logging.getLogger("lm_eval").setLevel(logging.ERROR)

TASK_FILE = Path(__file__).parent / "multiple_choice.yaml"
SAME_EXAMPLES = 10  # consecutive documents that get the same examples
Rows = list[JsonObject]
Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, context ids, continuation ids)
# in place of a control token that is meant as text, until the text is encoded
STAND_IN = re.compile("\U000f0000(\\d+)\U000f0001")


class SharedExamples(ContextSampler):
    """Draws the same examples for SAME_EXAMPLES documents in a row, so that they are computed once.

    The first examples of a longer draw are those of a shorter one: with more examples a prompt only grows. Labels come
    in equal shares, in random order, since models favour the label that examples show most often (Zhao et al. 2021,
    https://arxiv.org/abs/2102.09690).
    """

    def set_rnd(self, rnd: int | None) -> "SharedExamples":
        self.seed, self.calls = rnd, 0
        return self

    def sample(self, n: int, eval_doc: JsonObject | None = None, df: object = None, **_: Any) -> Sequence[JsonObject]:
        group, self.calls = self.calls // SAME_EXAMPLES, self.calls + 1
        docs = [doc for doc in self.fewshot_docs() if doc != eval_doc]
        rng = random.Random(f"{self.seed} {group}")
        rng.shuffle(docs)
        by_label: dict[object, list[JsonObject]] = {}
        for doc in docs:
            by_label.setdefault(doc["label"], []).append(doc)
        rounds = [[doc for doc in turn if doc is not None] for turn in itertools.zip_longest(*by_label.values())]
        return [doc for turn in rounds for doc in rng.sample(turn, len(turn))][:n]


def sharpen_head(model: PreTrainedModel) -> None:
    """Make the output head compute in float32, with its own weights even if it shared the embeddings'."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype != torch.float32:
        head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
        head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].float(),))


class SharedPrefixLM(HFLM):
    """HFLM with the log-likelihoods that this module's docstring describes; generation is HFLM's own.

    Only the chat template makes control tokens. In questions, examples and answers they are encoded as ordinary
    characters, as rlhf.data.encoding.encode_messages does.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        sharpen_head(model)
        self.chat = False
        self.controls = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)

    def _as_text(self, text: str) -> str:
        """The text with stand-ins for its control tokens."""
        pattern = "|".join(map(re.escape, self.controls)) or "(?!)"
        return re.sub(pattern, lambda found: f"\U000f0000{self.controls.index(found.group())}\U000f0001", text)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.chat = True  # from now on, control tokens in prompts are the template's
        safe = [{**message, "content": self._as_text(message["content"])} for message in chat_history]
        return super().apply_chat_template(safe, add_generation_prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(context, self._as_text(continuation))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        first, *others = STAND_IN.split(string if self.chat else self._as_text(string))
        ids = super().tok_encode(first, add_special_tokens)
        for number, text in zip(others[::2], others[1::2], strict=True):
            control = self.controls[int(number)]
            ids += self.tokenizer(control, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += super().tok_encode(text, add_special_tokens=False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """For generation, which is HFLM's own: control tokens in texts stay control tokens."""
        plain = [STAND_IN.sub(lambda found: self.controls[int(found[1])], string) for string in strings]
        return super().tok_batch_encode(plain, *args, **kwargs)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives the continuation) of each request."""
        contexts: dict[tuple[int, ...], list[int]] = {}
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            print(f"Warning: {cut} prompts don't fit into {self.max_length} tokens: their beginnings are cut off.")
        for number, (_, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.max_length + 1) :]
            contexts.setdefault(tuple(ids[: len(ids) - len(continuation)]), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        # a context of one token has nothing to compute before the answers
        if alone := [number for context, numbers in contexts.items() if len(context) < 2 for number in numbers]:
            scored = super()._loglikelihood_tokens([requests[number] for number in alone], disable_tqdm, override_bs)
            answers.update(zip(alone, scored, strict=True))
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods", initial=len(alone))
        longer = [context for context in contexts if len(context) > 1]
        for batch in self._batches(longer, override_bs or self.batch_size):
            rows = [(place, number) for place, context in enumerate(batch) for number in contexts[context]]
            continuations = [requests[number][2] for _, number in rows]
            logprobs = self._logprobs(batch, [place for place, _ in rows], continuations)
            for (_, number), row, continuation in zip(rows, logprobs, continuations, strict=True):
                answers[number] = self._read_off(row, continuation)
            progress.update(len(rows))
        progress.close()
        return [answers[number] for number in range(len(requests))]

    @staticmethod
    def _batches(contexts: list[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
        """Batches of contexts with the same beginning, sorted by length."""
        beginnings: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for context in contexts:
            beginnings.setdefault(context[:64], []).append(context)
        alone = [context for group in beginnings.values() if len(group) < size // 4 for context in group]
        groups = [group for group in beginnings.values() if len(group) >= size // 4] + [alone]
        batches = []
        for group in groups:
            group.sort(key=len, reverse=True)
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        return batches

    @torch.no_grad()
    def _logprobs(
        self, contexts: list[tuple[int, ...]], places: list[int], continuations: list[list[int]]
    ) -> torch.Tensor:
        """Log-probabilities (R, C, V), float32, at the tokens of R continuations, the longest of which has C.

        Args:
            contexts: D token sequences of two tokens or more.
            places: number of the context that each continuation follows.
        """
        device = self.device
        # the last token of a context runs with the answers, whose first token it predicts
        lengths = torch.tensor([len(context) - 1 for context in contexts], device=device)
        width = int(lengths.max())
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        padded = [[0] * (width + 1 - len(context)) + list(context[:-1]) for context in contexts]
        prompts = torch.tensor(padded, device=device)
        if not self._continues(prompts):
            return self._logprobs_of_whole_rows(contexts, places, continuations)
        cache = DynamicCache(config=self.model.config.get_text_config())
        settings = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        prefill(self.model, prompts, mask, cache, positions_of(mask), **settings)
        of = torch.tensor(places, device=device)
        cache.reorder_cache(of)
        size = max(map(len, continuations))
        inputs = [[contexts[place][-1], *row[:-1]] for place, row in zip(places, continuations, strict=True)]
        answers = torch.tensor([row + [0] * (size - len(row)) for row in inputs], device=device)
        seen = mask[of]
        logits = self.model(
            input_ids=answers, attention_mask=torch.cat([seen, torch.ones_like(answers)], 1), use_cache=True,
            position_ids=seen.sum(1, keepdim=True) + torch.arange(size, device=device), past_key_values=cache,
        ).logits  # fmt: skip
        return logits.float().log_softmax(-1)

    def _continues(self, prompts: torch.Tensor) -> bool:
        """Whether the model reads padded rows, and goes on from them with several tokens, as it reads whole rows."""
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        return (
            takes_positions
            and way_to_decode(self.model, {"input_ids": prompts}) is Way.TOGETHER
            and can_continue(self.model, self.model.config.get_text_config(), prompts[0])
        )

    def _logprobs_of_whole_rows(
        self, contexts: list[tuple[int, ...]], places: list[int], continuations: list[list[int]]
    ) -> torch.Tensor:
        """As `_logprobs`, without a cache."""
        rows = [[*contexts[place], *row[:-1]] for place, row in zip(places, continuations, strict=True)]
        ids, mask = rows_of(rows, self.device)
        first = torch.tensor([len(contexts[place]) - 1 for place in places], device=self.device)
        columns = first[:, None] + torch.arange(max(map(len, continuations)), device=self.device)
        columns = columns.clamp(max=ids.shape[1] - 1)
        output = logits_at(self.model, columns, input_ids=ids, attention_mask=mask, use_cache=False)
        return output.logits.float().log_softmax(-1)

    @staticmethod
    def _read_off(logprobs: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        logprobs = logprobs[: len(continuation)]
        ids = torch.tensor(continuation, device=logprobs.device)
        return float(logprobs.gather(1, ids[:, None]).sum()), bool((logprobs.argmax(-1) == ids).all())


# ---------------------------------------------------------------------------------------------- tasks and answers


@functools.cache
def _task_manager(known: bool) -> TaskManager:
    """The task manager, with lm-eval's own tasks (takes seconds) or without."""
    return TaskManager(include_defaults=known)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def find_tasks(names: list[str]) -> list[str]:
    """The names, if each is one of lm-eval's tasks or a YAML file in its format.

    Raises:
        InputError: if one is neither.
    """
    for name in names:
        if _is_file(name):
            if not Path(name).is_file():
                raise InputError(f"--tasks {name}: no such file.")
        elif name not in _task_manager(True).all_tasks:
            near = difflib.get_close_matches(name, [*TASKS, *_task_manager(True).all_tasks], n=1)
            raise InputError(
                f"--tasks {name}: neither a starter task ({', '.join(TASKS)}) nor one of lm-eval's nor a YAML file."
                + (f" Did you mean {near[0]}?" if near else "")
            )
    return names


def write_task(name: str, rows: dict[str, Rows], folder: Path) -> JsonObject:
    """Write a task's rows into the folder, and return its lm-eval configuration: eval/measuring/multiple_choice.yaml.

    Args:
        rows: `train`, from which examples are drawn, and `test`, both of rlhf.tasks.instructions.word_instructions.
    """
    files = {split: str(folder / f"{name}.{split}.jsonl") for split in rows}
    for split, file in files.items():
        write_jsonl(Path(file), rows[split])
    config = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    examples = {"sampler": SharedExamples, "split": config["fewshot_split"]}
    return {**config, "task": name, "dataset_kwargs": {"data_files": files}, "fewshot_config": examples}


def answer(
    lm: HFLM,
    tasks: list[str | JsonObject],
    num_fewshot: int,
    folder: Path,
    *,
    limit: int,
    apply_chat_template: bool,
    seed: int,
) -> dict[str, Rows]:
    """Let lm-eval ask all tasks with `num_fewshot` examples; answers of an interrupted run are read from its folder.

    Args:
        tasks: what `lm_eval.simple_evaluate` takes: names, files, configurations.
        folder: of the run, for answers-<num_fewshot>.jsonl.
        limit: largest number of test rows per task.

    Returns:
        by task, one row per test row: `task`, `number`, `score` (of the task's first metric), `responses` and `doc`.

    Raises:
        InputError: if a task can't be loaded (for example because the Hub can't be reached) or has too few rows to draw
            `num_fewshot` examples from, or its metric has no value for a single row.
    """
    file = folder / f"answers-{num_fewshot}.jsonl"
    if not file.exists():
        manager = _task_manager(any(isinstance(task, str) and not _is_file(task) for task in tasks))
        try:
            results = lm_eval.simple_evaluate(
                lm, tasks=copy.deepcopy(tasks), num_fewshot=num_fewshot, limit=limit, bootstrap_iters=0,
                apply_chat_template=apply_chat_template, task_manager=manager, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except InputError:
            raise
        except (OSError, KeyError, ValueError, DatasetsError) as error:  # ValueError: say, too few examples
            raise InputError(
                f"--tasks, --num_fewshot {num_fewshot}: lm-eval can't ask a task ({type(error).__name__}: {error})."
            ) from error
        write_jsonl(file, [
            {"task": task, "number": sample["doc_id"], "score": _score(task, sample),
             "responses": sample["filtered_resps"], "doc": sample["doc"]}
            for task, samples in results["samples"].items()
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ])  # fmt: skip
    return _read(file)


def _score(task: str, sample: JsonObject) -> float:
    score = sample[sample["metrics"][0]]
    if not isinstance(score, int | float):
        raise InputError(f"--tasks {task}: its metric {sample['metrics'][0]} has no value for a single row.")
    return float(score)


def _read(file: Path) -> dict[str, Rows]:
    tasks: dict[str, Rows] = {}
    for row in read_jsonl(file, task=str, score=float | int, doc=dict):
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def read_answers(folder: str, num_fewshot: list[int], tasks: dict[str, dict[str, Rows]]) -> dict[int, dict[str, Rows]]:
    """The answers of the baseline, another run, by number of examples and task.

    Raises:
        InputError: if its questions differ.
    """
    answers = {}
    for number in num_fewshot:
        answers[number] = _read(Path(folder) / f"answers-{number}.jsonl")
        for task, rows in tasks.items():
            asked = [row["doc"].get("prompt") for row in answers[number].get(task, [])]
            if asked != [row["prompt"] for row in rows["test"]]:
                raise InputError(
                    f"--baseline_dir {folder}: has other questions in task {task!r}. Run both with the same "
                    "--tasks, --limit, --num_templates and --seed."
                )
    return answers


# ---------------------------------------------------------------------------------------------- results


def _cells(rows_by_task: dict[str, Rows], seed: int) -> dict[str, Interval]:
    return {task: interval([row["score"] for row in rows], seed=seed) for task, rows in rows_by_task.items()}


def by_cluster(tasks: dict[str, Rows]) -> dict[str, Rows]:
    """The rows of all tasks of a cluster together; tasks without one are left out."""
    clusters: dict[str, Rows] = {}
    for rows in tasks.values():
        for row in rows:
            if "cluster" in row["doc"]:
                clusters.setdefault(row["doc"]["cluster"], []).append(row)
    return clusters


def summarize_answers(answers: dict[int, dict[str, Rows]], seed: int) -> JsonObject:
    """Means with intervals, and the differences between the most and the fewest examples.

    Returns:
        `tasks.<task>.<number of examples>`, `clusters.<cluster>.<number>` and `differences.<task>`, each
        {mean, low, high, n}.
    """

    def by_name(cells: dict[int, dict[str, Interval]]) -> JsonObject:
        names = next(iter(cells.values()))
        return {name: {str(number): cells[number][name].to_json() for number in cells} for name in names}

    tasks = {number: _cells(rows, seed) for number, rows in answers.items()}
    clusters = {number: _cells(by_cluster(rows), seed) for number, rows in answers.items()}
    most, fewest = max(answers), min(answers)
    gains = {}
    if most > fewest:
        gains = {name: cell.minus(tasks[fewest][name], seed).to_json() for name, cell in tasks[most].items()}
    return {"tasks": by_name(tasks), "clusters": by_name(clusters), "differences": gains}


def compare_with_baseline(
    answers: dict[int, dict[str, Rows]], baseline: dict[int, dict[str, Rows]], seed: int
) -> dict[str, JsonObject]:
    """Paired differences from the baseline: `task.<task>.<number of examples>`, `cluster.<cluster>.<number>`.

    Raises:
        InputError: if a task's rows are not those of the baseline.
    """
    result: dict[str, JsonObject] = {"task": {}, "cluster": {}}
    for number, tasks in answers.items():
        tasks = {task: rows for task, rows in tasks.items() if task in baseline[number]}
        before = {task: baseline[number][task] for task in tasks}
        for task, rows in tasks.items():
            if [row["doc"] for row in rows] != [row["doc"] for row in before[task]]:
                raise InputError(
                    f"--baseline_dir: task {task!r} has {len(rows)} rows here and {len(before[task])} in the baseline, "
                    "or different rows. Run both with the same --limit and --seed, on the same data."
                )
        for kind, ours, theirs in (("task", tasks, before), ("cluster", by_cluster(tasks), by_cluster(before))):
            first, second = _cells(ours, seed), _cells(theirs, seed)
            for name in second:
                difference = first[name].minus(second[name], seed)
                result[kind].setdefault(name, {})[str(number)] = difference.to_json()
    return result
