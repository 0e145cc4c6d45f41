"""Model cards: base, lineage, results, hyperparameters, how to load the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from rlhf.hub.lineage import is_local, lineage_of, public_base, public_value
from rlhf.models.sources import Source, language_model_class
from rlhf.rewards import RewardSource
from rlhf.run.files import read_json
from rlhf.run.folders import command, settings_of
from rlhf.run.processes import main_process
from rlhf.starter.model import STARTER

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PIPELINE_TAGS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


def write_card(
    output_dir: str,
    recipe: str,
    arguments: Sequence[DataclassInstance],
    *,
    source: Source | None,
    datasets: list[str],
    metrics: Mapping[str, object],
    tokenizer_name: str | None = None,
    rewards: Sequence[RewardSource] = (),
    repo_id: str | None = None,
    auto_class: str | None = None,
    load_options: Mapping[str, object] | None = None,
) -> None:
    """Write README.md into the run folder: base, datasets, lineage, results, hyperparameters, how to load it.

    Args:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses of flags; the card lists their settings.
        source: the model that training started from; None for new weights.
        datasets: names of the training data.
        metrics: results, by name.
        tokenizer_name: the tokenizer of a model with new weights.
        rewards: the reward models and functions that the policy was trained on.
        repo_id: the card's title; default: the folder's name.
        auto_class: the class that loads the model, where the recipe's name doesn't imply it.
        load_options: arguments that `from_pretrained` of an adapter's base needs, such as the labels' names.
    """
    if not main_process():
        return
    stage = Path(recipe).stem
    title = repo_id or Path(output_dir).resolve().name
    base = public_base(source.base) if source else None
    is_adapter = (Path(output_dir) / "adapter_config.json").exists()
    auto = auto_class or _auto_class(output_dir, stage, source)
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        datasets=[d for d in datasets if d != STARTER and not is_local(d)] or None,
        tags=["rlhf-recipes", stage, *(["lora"] if is_adapter else [])],
        pipeline_tag=PIPELINE_TAGS.get(auto),
    )
    pictures = [name for name in ("calibration.png", "training.png") if (Path(output_dir) / name).exists()]
    card = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"Made by `recipes/{stage}.py` of rlhf-recipes from " + (f"`{base}`." if base else "text alone."),
        "## Results",
        _table(["measured", "value"], [(name, _number(value)) for name, value in metrics.items()]),
        *(f"![{Path(name).stem}]({name})\n" for name in pictures[:1]),
        "## Lineage",
        _table(["", "name", "revision"], _lineage_rows(source, tokenizer_name, rewards, datasets)),
        "## Use",
        _usage(title, base, auto, is_adapter, load_options or {}),
        "## Made with",
        f"```\n{command(recipe)}\n```\n\nPaths outside of the working folder are cut to their last name.\n",
        _table(["setting", "value"], sorted(_public_settings(arguments).items())),
        ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "peft", "torch")),
    ]
    (Path(output_dir) / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def _table(heading: list[str], rows: Sequence[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|" + " - |" * len(heading)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def _lineage_rows(
    source: Source | None, tokenizer_name: str | None, rewards: Sequence[RewardSource], datasets: list[str]
) -> list[tuple[str, str, str]]:
    lineage = lineage_of(source, tokenizer_name, rewards, datasets)
    return [(role, origin.name, origin.revision or f"sha256 {origin.sha256 or '-'}") for role, origin in lineage]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _public_settings(arguments: Sequence[DataclassInstance]) -> dict[str, str]:
    """Settings that differ from their defaults, with public names for paths, without the token."""
    settings = settings_of(*arguments)
    return {name: public_value(value) for name, value in settings.items() if not name.endswith("hub_token")}


def _auto_class(output_dir: str, stage: str, source: Source | None) -> str:
    """The class that loads a run's model: that of its recipe, or of its head for a pretrained model."""
    if stage == "reward":
        return "AutoModelForSequenceClassification"
    heads = (read_json(Path(output_dir) / "config.json") or {}).get("architectures") or [""]
    if stage == "pretrain" and heads[0].endswith(("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")):
        return "AutoModelFor" + heads[0].rpartition("For")[2].replace("ConditionalGeneration", "Seq2SeqLM")
    return "AutoModelForCausalLM" if source is None else language_model_class(source).__name__


def _usage(title: str, base: str | None, auto: str, is_adapter: bool, options: Mapping[str, object]) -> str:
    ready = f'from transformers import pipeline\n\npipeline("{PIPELINE_TAGS.get(auto)}", model="{title}")'
    if not is_adapter:
        code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{title}")'
        return f"```python\n{code}\n" + (f"\n# or\n{ready}\n```" if "id2label" in options else "```")
    if auto == "AutoModelForSequenceClassification" and not options:
        options = {"num_labels": 1}  # a reward model
    extra = "".join(f", {name}={value!r}" for name, value in options.items())
    code = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{base}"{extra})\nmodel = PeftModel.from_pretrained(base, "{title}")'
    )
    if auto == "AutoModelForCausalLM":
        code += f"\n\n# or\n{ready}"
    return f"```python\n{code}\n```"
