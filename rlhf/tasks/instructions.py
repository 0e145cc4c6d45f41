"""Labelled tasks → instructions: a prompt, worded answer options, and the number of the right one.

Templates are Jinja, several per task, in YAML files such as rlhf/tasks/templates/sentiment.yaml:

    task: sentiment
    cluster: sentiment
    choices: [negative, positive]            # only for datasets without a column `choices`
    templates:
      - name: how it sounds
        prompt: "How does this message sound? {{ text }}\\n{{ options | join(' or ') }}?"
        choices: [bad, good]                 # wordings of the answers, in the order of the labels; or
      - name: label
        prompt: "Message: {{ text }}\\nSentiment:"
        choice: "{{ choice | upper }}"       # a template for each answer. Without either, answers are unchanged

A prompt may name the task's input columns and `options`, the list of worded answers, but not the answer. Templates run
in Jinja's sandbox.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml
from datasets import Dataset
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment
from trl import ScriptArguments

from rlhf.data.datasets import load_splits
from rlhf.data.paths import need_file
from rlhf.errors import InputError
from rlhf.starter.model import STARTER
from rlhf.starter.tasks import TASKS, starter_task
from rlhf.tasks.problems import Row

FOLDER = Path(__file__).parent / "templates"
HIDDEN = {"label", "answer", "choices"}  # columns that a prompt may not name: the answer, and what `options` holds
ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


@dataclass
class TaskArguments:
    """Which tasks. --dataset_name (of ScriptArguments) and --templates give your own dataset."""

    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Starter tasks. Default: all, or none with your own dataset."},
    )
    templates: str | None = field(
        default=None,
        metadata={"help": "YAML file with the templates of --dataset_name (rlhf/tasks/instructions.py)."},
    )
    include_options: bool = field(
        default=False, metadata={"help": "List the answer options after prompts that don't name them (FLAN)."}
    )


class Template(NamedTuple):
    """One way to word a task."""

    name: str
    prompt: str  # Jinja, with the input columns and `options`
    choices: list[str] | None  # worded answers in the order of the labels
    choice: str  # Jinja, with `choice`: the wording of each answer


class TemplateFile(NamedTuple):
    """Content of a YAML file of templates."""

    task: str
    cluster: str
    choices: list[str] | None
    templates: list[Template]


class InstructionTask(NamedTuple):
    """A task with its templates. Rows have `choices` (list of strings) and `label` (index of the right one)."""

    name: str
    cluster: str
    templates: list[Template]
    train: Dataset
    test: Dataset


# ---------------------------------------------------------------------------------------------- templates


@functools.cache
def _names_in(template: str, where: str) -> set[str]:
    """The variables that a template reads."""
    try:
        return meta.find_undeclared_variables(ENVIRONMENT.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: not a Jinja template ({error}). Correct it.") from error


def _texts(choices: object, where: str) -> list[str] | None:
    if choices is None:
        return None
    if not isinstance(choices, list) or any(isinstance(choice, bool) for choice in choices):
        raise InputError(
            f"{where}: 'choices' must be a list of texts; found {choices}. Quote words such as yes and no."
        )
    return [str(choice) for choice in choices]


def read_templates(path: Path) -> TemplateFile:
    """Read and check a YAML file of templates.

    Raises:
        InputError: if it can't be read, lacks a key, or two templates have the same name.
    """
    where = f"--templates {path}"
    need_file(path, "--templates")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not readable as YAML ({error}).") from error
    if not isinstance(content, dict) or not {"task", "cluster", "templates"} <= set(content):
        raise InputError(f"{where}: needs 'task', 'cluster' and 'templates'; see rlhf/tasks/templates/sentiment.yaml.")
    templates = []
    for number, entry in enumerate(content["templates"] or []):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise InputError(f"{where}: template {number} has no 'prompt', a text. Give one.")
        if unknown := set(entry) - {"name", "prompt", "choices", "choice"}:
            raise InputError(f"{where}: template {number} has the unknown key {sorted(unknown)[0]!r}.")
        choices = _texts(entry.get("choices"), f"{where}: template {number}")
        name, choice = str(entry.get("name", number)), str(entry.get("choice", "{{ choice }}"))
        templates.append(Template(name, entry["prompt"], choices, choice))
    if not templates or len({template.name for template in templates}) < len(templates):
        raise InputError(f"{where}: has {'two templates of one name' if templates else 'no templates'}.")
    return TemplateFile(str(content["task"]), str(content["cluster"]), _texts(content.get("choices"), where), templates)


def check_templates(file: TemplateFile, columns: set[str], where: str) -> None:
    """Check that every variable of the templates is known.

    Raises:
        InputError: naming the template, the unknown column and the known ones.
    """
    known = {"prompt": (columns - HIDDEN) | {"options"}, "choice": {"choice"}}
    for template in file.templates:
        for kind, text in (("prompt", template.prompt), ("choice", template.choice)):
            place = f"{where}: template {template.name!r} of task {file.task!r}"
            if missing := _names_in(text, place) - known[kind]:
                raise InputError(
                    f"{place} names the column {sorted(missing)[0]!r} in its {kind!r}, which does not exist. "
                    f"Found: {', '.join(sorted(known[kind]))}."
                )


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(template)


def render(template: Template, row: Row, where: str = "--templates") -> tuple[str, list[str]]:
    """The prompt and the worded choices of one row.

    >>> template = Template("label", "{{ text }} {{ options | join(' or ') }}?", None, "{{ choice | upper }}")
    >>> render(template, {"text": "Great!", "choices": ["bad", "good"], "label": 1})
    ('Great! BAD or GOOD?', ['BAD', 'GOOD'])

    Args:
        row: the input columns, `choices` and `label`.

    Raises:
        InputError: if the row has another number of choices than the template, or the template fails on the row.
    """
    choices = row["choices"]
    if template.choices is not None and len(template.choices) != len(choices):
        raise InputError(
            f"{where}: template {template.name!r} words {len(template.choices)} choices; a row has {len(choices)}: "
            f"{choices}. Word each of them, in the order of the labels."
        )
    inputs = {name: value for name, value in row.items() if name not in HIDDEN}
    try:
        options = template.choices or [_compiled(template.choice).render(choice=choice) for choice in choices]
        return _compiled(template.prompt).render({**inputs, "options": options}).strip(), list(options)
    except Exception as error:  # Jinja's errors, the sandbox's, and any error of a filter
        raise InputError(
            f"{where}: template {template.name!r} can't be rendered ({error}) for the row {str(inputs)[:200]}. Correct "
            "the template or the row."
        ) from error


# ---------------------------------------------------------------------------------------------- tasks


def expand_tasks(names: list[str]) -> list[str]:
    """Names of starter tasks, each once. `starter` means all of them.

    Raises:
        InputError: for an unknown task.
    """
    for name in names:
        if name not in {STARTER, *TASKS}:
            raise InputError(f"--tasks {name}: unknown. Tasks are {', '.join(TASKS)}, or '{STARTER}' for all of them.")
    return list(dict.fromkeys(task for name in names for task in (TASKS if name == STARTER else [name])))


def load_tasks(
    script_args: ScriptArguments, args: TaskArguments, max_train: int, max_test: int, seed: int
) -> list[InstructionTask]:
    """The starter's tasks and the user's own.

    Args:
        max_train, max_test: largest number of rows per task.

    Raises:
        InputError: if a task or template can't be used, or a task has no held-out part.
    """
    own = script_args.dataset_name not in (None, STARTER)
    if own != (args.templates is not None):
        raise InputError("--dataset_name and --templates belong together: give both, or neither for the starter tasks.")
    names = expand_tasks(args.tasks if args.tasks is not None else [] if own else [STARTER])
    tasks = []
    for name in names:
        file, splits = read_templates(FOLDER / f"{name}.yaml"), starter_task(name, max_train, max_test, seed)
        check_templates(file, set(splits["train"].column_names), f"rlhf/tasks/templates/{name}.yaml")
        tasks.append(InstructionTask(name, file.cluster, file.templates, splits["train"], splits["test"]))
    if own:
        tasks.append(_own_task(script_args, Path(str(args.templates)), max_train, max_test, seed))
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"--templates {args.templates}: a starter task has the same name. Change 'task' in the file.")
    return tasks


def _own_task(script_args: ScriptArguments, path: Path, max_train: int, max_test: int, seed: int) -> InstructionTask:
    file, name = read_templates(path), str(script_args.dataset_name)
    train, test = load_splits(script_args, "")
    columns = set(train.column_names)
    if not columns & {"label", "answer"} or not ("choices" in columns or file.choices):
        raise InputError(
            f"--dataset_name {name}: needs 'label' (a number) or 'answer' (a text), and 'choices' as a column or in "
            f"{path.name}; found {sorted(columns)}."
        )
    if "options" in columns:
        raise InputError(
            f"--dataset_name {name}: has a column 'options', which in templates is the list of worded answers. Rename "
            "it (to 'choices', if it holds the answers to choose from)."
        )
    check_templates(file, columns, f"--templates {path.name}")
    train, test = [_labelled(split, file, name).shuffle(seed=seed) for split in (train, test)]
    _refuse_overlap(train, test, file, name)
    train, test = [s.select(range(min(len(s), n))) for s, n in ((train, max_train), (test, max_test))]
    return InstructionTask(file.task, file.cluster, file.templates, train, test)


def _refuse_overlap(train: Dataset, test: Dataset, file: TemplateFile, name: str) -> None:
    """Raise InputError if a test row equals a training row in the columns that the templates name."""
    named = {variable for template in file.templates for variable in _names_in(template.prompt, template.name)}
    asked = sorted(named - {"options"}) or ["choices"]
    trained_on = {str([row[column] for column in asked]) for row in train}
    both = [row for row in test if str([row[column] for column in asked]) in trained_on]
    if both:
        example = ", ".join(f"{column} {str(both[0][column])[:80]!r}" for column in asked)
        raise InputError(
            f"--dataset_name {name}: {len(both)} of {len(test)} test rows of task {file.task!r} are training rows too. "
            f"Example: {example}. Remove repeated rows; at least two different ones are needed."
        )


def _labelled(split: Dataset, file: TemplateFile, name: str) -> Dataset:
    """The split with `choices` and `label` in the form of the starter's tasks."""

    def complete(row: Row, number: int) -> Row:
        choices = row.get("choices") or file.choices or []
        if not isinstance(choices, list) or not all(type(choice) in (str, int, float) for choice in choices):
            raise InputError(
                f"--dataset_name {name}: row {number} has the choices {str(choices)[:80]}, not a list of texts or "
                "numbers. Correct the column 'choices', or remove it and write 'choices' into the templates."
            )
        choices = [str(choice) for choice in choices]
        label = row["label"] if "label" in row else row["answer"]
        if isinstance(label, str):
            if label not in choices:
                raise InputError(f"--dataset_name {name}: row {number} has the label {label!r}, not among {choices}.")
            label = choices.index(label)
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise InputError(f"--dataset_name {name}: row {number} has the label {label!r} for {len(choices)} choices.")
        return {"choices": choices, "label": label}

    rows = [{**row, **complete(row, number)} for number, row in enumerate(split)]
    return Dataset.from_list(rows)


def hold_out(tasks: list[InstructionTask], clusters: list[str]) -> tuple[list[InstructionTask], list[InstructionTask]]:
    """The tasks to train on, and the tasks of the held-out clusters.

    Raises:
        InputError: if a cluster has no task, or no task is left to train on.
    """
    found = {task.cluster for task in tasks}
    for cluster in clusters:
        if cluster not in found:
            raise InputError(f"--held_out_clusters {cluster}: has no task. Clusters are {', '.join(sorted(found))}.")
    left = [task for task in tasks if task.cluster not in clusters]
    if not left:
        raise InputError(f"--held_out_clusters {' '.join(clusters)}: leaves no task to train on. Name fewer clusters.")
    return left, [task for task in tasks if task.cluster in clusters]


def word_instructions(
    task: InstructionTask, rows: Dataset, num_templates: int | None = None, include_options: bool = False
) -> list[Row]:
    """Rows as instructions. The task's first `num_templates` templates (default: all) take turns.

    Args:
        include_options: append the list of options to prompts whose template doesn't use `options` (FLAN, §2.2).

    Returns:
        rows of `prompt`, `choices` (worded), `label`, `task`, `cluster` and `template`.
    """
    templates = task.templates[:num_templates]
    instructions = []
    for number, row in enumerate(rows):
        template = templates[number % len(templates)]
        prompt, choices = render(template, row, f"task {task.name!r}")
        if include_options and "options" not in _names_in(template.prompt, template.name):
            prompt = "\n".join([prompt, "Options:", *(f"- {choice}" for choice in choices)])
        instructions.append({
            "prompt": prompt, "choices": choices, "label": row["label"], "task": task.name, "cluster": task.cluster,
            "template": template.name,
        })  # fmt: skip
    return instructions


def as_conversation(instruction: Row) -> Row:
    """An instruction as `prompt` and `completion`, messages for recipes/sft.py."""
    return {
        "prompt": [{"role": "user", "content": instruction["prompt"]}],
        "completion": [{"role": "assistant", "content": instruction["choices"][instruction["label"]]}],
        **{name: instruction[name] for name in ("task", "cluster", "template")},
    }
