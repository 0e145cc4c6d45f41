"""Every family of language models that transformers has, tiny, against plain transformers: `make families`.

    python tests/families.py --only gpt_neo mamba

For each model type with a causal language model, a tiny random model (tiny_models.py) goes through PPO: one batch of
rows of very different lengths, with and without a beginning that all share, some of which end early; then one update.
A second copy of the model, loaded by transformers alone, reads every row by itself: in eager attention, without
padding and without a cache. Tokens, log-probabilities, the reference's, values, KL and advantages must agree within
1e-4, and the first ratio must be 1. Then SFT and a reward model train one step; what was saved must give the same
outputs after loading. Each model type has a process of its own. Results are kept in --results_dir, and a second run
goes on where the first one ended (--again begins anew); the table goes to docs/families.md.
"""

import argparse
import contextlib
import copy
import datetime
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_models import EOS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.data.datasets import Row
from rlhf.data.pairs import encode_pair
from rlhf.errors import InputError
from rlhf.models.adapters import active_adapter, disable_dropout
from rlhf.models.generation import Way, way_to_decode
from rlhf.models.loading import load_causal_lm, load_reward_model
from rlhf.models.losses import fit_loss
from rlhf.models.sources import base_config, reads_pairs, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.rollout import draw_uniforms
from rlhf.ppo.types import Rollout
from rlhf.rewards import RewardModel
from rlhf.tasks.seq2seq import Seq2SeqSFTTrainer

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
RESPONSE, TEMPERATURE = 10, 0.8
STOPS = [EOS, *range(3, 299, 4)]  # many tokens end a reply, so that rows end early
FULL = ModelConfig(dtype="float32")
LORA = ModelConfig(dtype="float32", use_peft=True, lora_r=4, lora_target_modules=["all-linear"], lora_dropout=0.0)
SHARED, LONGER = 30, (1, 9, 33, 2, 60, 5, 17, 1)  # tokens that all prompts begin with, and how many more each has
LENGTHS = (2, 9, 33, 1, 60, 5, 9, 12)  # of prompts that share nothing


class Wrong(AssertionError):
    """A number differs from plain transformers."""


def prompt_rows(shared: bool) -> list[Row]:
    """Eight prompts of random bytes."""
    generator = torch.Generator().manual_seed(5)

    def some(count: int) -> list[int]:
        return torch.randint(3, 150, (count,), generator=generator).tolist()

    beginning = some(SHARED)
    return [{"input_ids": beginning + some(n)} for n in LONGER] if shared else [{"input_ids": some(n)} for n in LENGTHS]


def agree(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise Wrong unless the two agree."""
    if found.shape != expected.shape:
        raise Wrong(f"{name}: shape {tuple(found.shape)} for {tuple(expected.shape)}")
    error = float((found.float() - expected.float()).abs().max()) if found.numel() else 0.0
    if not error <= tolerance:
        raise Wrong(f"{name}: off by {error:.2g}")


# ------------------------------------------------------------------------------------------------ plain transformers


def plain_copy(folder: Path, trained: PreTrainedModel | PeftModel) -> Any:
    """The trained model, loaded by transformers alone."""
    whole = trained.get_base_model() if isinstance(trained, PeftModel) else trained
    model = type(whole).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if isinstance(trained, PeftModel):
        model = get_peft_model(model, copy.deepcopy(trained.peft_config["default"]))
    model.load_state_dict(trained.state_dict(), strict=False)
    return model.eval()


@torch.no_grad()
def read_row(model: PreTrainedModel | PeftModel, ids: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (T, V) of the next token and hidden states (T, d) before `length` tokens.

    The row is alone, unpadded, without a cache. The hidden states are those in front of the head; an encoder-decoder's
    are those of its decoder's last layer.
    """
    if model.config.is_encoder_decoder:
        output = model(
            input_ids=torch.tensor([ids[:-length]]), use_cache=False, output_hidden_states=True,
            decoder_input_ids=torch.tensor([[model.generation_config.decoder_start_token_id, *ids[-length:-1]]]),
        )  # fmt: skip
        return (output.logits[0] / TEMPERATURE).float().log_softmax(-1), output.decoder_hidden_states[-1][0]
    caught = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: caught.append(inputs[0]))
    logits = model(input_ids=torch.tensor([ids])).logits / TEMPERATURE
    hook.remove()
    hidden = caught[-1] if caught[-1].ndim == 3 else model.base_model(input_ids=torch.tensor([ids]))[0]
    return logits[0, -length - 1 : -1].float().log_softmax(-1), hidden[0, -length - 1 : -1]


# ------------------------------------------------------------------------------------------------ PPO


def reward(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that differs from row to row."""
    return [sum(ids) % 17 / 5 for ids in completion_ids]


def make_trainer(folder: Path, model_args: ModelConfig, scratch: Path) -> PPOTrainer:
    """A trainer whose policy, reference and value function all differ."""
    tokenizer = load_tokenizer(resolve(str(folder)))
    config = PPOConfig(
        output_dir=str(scratch), total_episodes=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_mini_batches=1, num_ppo_epochs=1, response_length=RESPONSE, learning_rate=1e-3, bf16=False, use_cpu=True,
        activation_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, stop_token=None,
        stop_token_id=STOPS, local_rollout_forward_batch_size=8, kl_coef=0.3, temperature=TEMPERATURE,
    )  # fmt: skip
    policy = load_causal_lm(resolve(str(folder)), model_args, tokenizer)
    trainer = PPOTrainer(
        config, tokenizer, policy, train_dataset=Dataset.from_list(prompt_rows(True)), reward_funcs=[reward]
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif parameter.requires_grad and "lora" not in name and parameter.numel() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std())
        head = trainer.model.value_head
        head.weight.normal_(std=head.in_features**-0.5)
    return trainer


def check_rollout(rollout: Rollout, model: Any, uniforms: torch.Tensor) -> set[int]:
    """Each token is the one that its random number draws from the plain model's distribution. Returns the lengths."""
    lengths = rollout.completion_mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        ids = rollout.input_ids[row][rollout.attention_mask[row].bool()].tolist()
        cumulative = read_row(model, ids, length)[0].double().exp().cumsum(-1)
        for place, token in enumerate(ids[-length:]):
            below = 0.0 if token == 0 else float(cumulative[place, token - 1])
            number = float(uniforms[row, place])
            if not below - TOLERANCE <= number <= float(cumulative[place, token]) + TOLERANCE:
                off = max(below - number, number - float(cumulative[place, token]))
                raise Wrong(
                    f"tokens: row {row}, token {place} of {length} isn't the one that was drawn (off by {off:.2g})"
                )
        if (ids[-1] in STOPS) != bool(rollout.ended[row]) or (length < RESPONSE and ids[-1] not in STOPS):
            raise Wrong(f"tokens: row {row} ends wrongly")
    return set(lengths)


def check_ppo(folder: Path, model_args: ModelConfig, scratch: Path) -> str:
    """One batch and one update; raises Wrong. Returns how rows were decoded."""
    trainer = make_trainer(folder, model_args, scratch)
    policy = trainer.model.policy
    plain = plain_copy(folder, policy)
    base = plain_copy(folder, trainer.ref_model) if trainer.ref_model is not None else plain
    uniforms = draw_uniforms(0, range(8), RESPONSE, trainer.args.seed, torch.device("cpu"))
    lengths: set[int] = set()
    for shared in (False, True):
        rollout = trainer.rollout(prompt_rows(shared))
        lengths |= check_rollout(rollout, plain, uniforms)
        trainer.reward_scale = None
        scored = trainer.score(rollout)
        advantages = trainer.advantages(rollout, scored)
        expected = [torch.zeros_like(scored.logprobs) for _ in range(3)]
        for row, length in enumerate(rollout.completion_mask.sum(1).tolist()):
            ids = rollout.input_ids[row][rollout.attention_mask[row].bool()].tolist()
            logprobs, hidden = read_row(plain, ids, length)
            with active_adapter(base, None) if base is plain else contextlib.nullcontext():
                reference, _ = read_row(base, ids, length)
            tokens = torch.tensor(ids[-length:])[:, None]
            expected[0][row, :length] = logprobs.gather(1, tokens)[:, 0]
            expected[1][row, :length] = reference.gather(1, tokens)[:, 0]
            expected[2][row, :length] = trainer.model.value_head(hidden)[:, 0].detach()
        kind = "" if shared else " (nothing shared)"
        agree("log-probabilities" + kind, scored.logprobs, expected[0])
        agree("reference" + kind, scored.reference_logprobs, expected[1])
        agree("values" + kind, scored.values, expected[2])
        agree("KL" + kind, scored.logprobs - scored.reference_logprobs, expected[0] - expected[1])
        args = trainer.args
        wanted = estimate_advantages(
            scored.scores,
            expected[0],
            expected[1],
            expected[2],
            rollout.completion_mask,
            kl_coef=args.kl_coef,
            gamma=args.gamma,
            lam=args.lam,
        )
        agree("advantages" + kind, advantages.advantages, wanted.advantages)
    if len(lengths) == 1:
        raise Wrong("all rows are equally long: the test shows nothing")
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    stats = trainer.update(rollout, scored, advantages)
    agree("first ratio", torch.tensor(stats.first_ratio), torch.tensor(1.0))
    agree("first log ratios", torch.tensor(2 * stats.approxkl).sqrt(), torch.tensor(0.0))
    if not any(not torch.equal(p, before[name]) for name, p in policy.named_parameters() if p.requires_grad):
        raise Wrong("the update changed nothing")
    if not all(bool(p.isfinite().all()) for p in policy.parameters()):
        raise Wrong("the update made weights that are no numbers")
    prompts = {"input_ids": torch.tensor([[3, 4, 5]])}
    return {Way.TOGETHER: "exact", Way.BY_LENGTH: "exact, by length", Way.UNCACHED: "exact, no cache"}[
        way_to_decode(policy, prompts)
    ]


# ------------------------------------------------------------------------------------------------ SFT, reward model


TRAINING: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "use_cpu": True,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip
TEXTS = ("A walk in the rain", "Tea", "Snow and music and a long day", "Chess!")


@torch.no_grad()
def outputs(model: Any, rows: list[list[int]], replies: bool = False) -> list[torch.Tensor]:
    """Logits of rows, each alone. With `replies` an encoder-decoder's decoder gets the rows too."""
    model.eval()
    inputs = [{"input_ids": torch.tensor([row])} for row in rows]
    if replies and model.config.is_encoder_decoder:
        inputs = [{**one, "decoder_input_ids": one["input_ids"], "use_cache": False} for one in inputs]
    return [model(**one).logits[0].float() for one in inputs]


def check_sft(folder: Path, model_args: ModelConfig, scratch: Path) -> str:
    """One step of SFT; what was saved gives the trained model's logits."""
    source = resolve(str(folder))
    tokenizer = load_tokenizer(source)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    model = load_causal_lm(source, model_args, tokenizer)
    first = outputs(model, rows, True)
    trainer_class = Seq2SeqSFTTrainer if model.config.is_encoder_decoder else SFTTrainer
    # no first token is learned: Trainer counts it for some classes, though nothing predicts it
    learned = Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])
    args = SFTConfig(output_dir=str(scratch), **TRAINING)
    fit_loss(args, model)
    disable_dropout(model)  # so that the loss is that of the plain model
    trainer = trainer_class(
        model=model, args=args, processing_class=tokenizer, train_dataset=learned, eval_dataset=learned,
    )  # fmt: skip
    loss = torch.tensor(trainer.train().training_loss)
    routed = getattr(model.config.get_text_config(), "output_router_logits", None) is not None  # adds a loss of its own
    if not routed and not model.config.is_encoder_decoder:
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")
            for logits, row in zip(first, rows, strict=True)
        ]
        agree("SFT's loss", loss, torch.cat(losses).mean(), 1e-3)
    trainer.save_model()
    trained = outputs(trainer.model, rows, True)
    if all(torch.equal(*pair) for pair in zip(first, trained, strict=True)):
        raise Wrong("SFT changed nothing")
    loaded = load_causal_lm(resolve(str(scratch)), model_args, tokenizer, trainable=False)
    for found, expected in zip(outputs(loaded, rows, True), trained, strict=True):
        agree("logits after loading", found, expected)
    return "exact"


def check_reward(folder: Path, model_args: ModelConfig, scratch: Path) -> str:
    """One step of a reward model; what was saved gives the trained model's scores, row by row and in a batch."""
    source = resolve(str(folder))
    tokenizer = load_tokenizer(source, classifier=True)
    pairs = reads_pairs(tokenizer, base_config(source))
    rows = [encode_pair(tokenizer, "", text)["input_ids"] if pairs else [*tokenizer(text).input_ids, EOS]
            for text in TEXTS]  # fmt: skip
    model = load_reward_model(source, model_args, tokenizer)
    trainer = RewardTrainer(
        model=model, args=RewardConfig(output_dir=str(scratch), **TRAINING), processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [{"chosen_ids": one, "rejected_ids": other} for one, other in zip(rows, rows[::-1], strict=True)]
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trained = torch.stack(outputs(trainer.model, rows))[:, 0]
    loaded = load_reward_model(resolve(str(scratch)), model_args, tokenizer, trainable=False)
    agree("scores after loading", torch.stack(outputs(loaded, rows))[:, 0], trained)
    tokenizer = load_tokenizer(resolve(str(scratch)), classifier=True)
    scores = RewardModel(loaded, tokenizer)(["" for _ in TEXTS], list(TEXTS))
    agree("scores of a batch", torch.tensor(scores), trained)
    return "exact"


# ------------------------------------------------------------------------------------------------ all families


CHECKS: dict[str, tuple[Callable[[Path, ModelConfig, Path], str], ModelConfig]] = {
    "PPO": (check_ppo, FULL), "PPO LoRA": (check_ppo, LORA), "SFT": (check_sft, FULL), "SFT LoRA": (check_sft, LORA),
    "reward": (check_reward, FULL), "reward LoRA": (check_reward, LORA),
}  # fmt: skip


def kinds_of_models() -> dict[str, tuple[str, str]]:
    """Model type and kind (see `tiny_config`) of everything that is checked, by name."""
    causal, masked = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both_parts = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    encoders = [
        name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        if name not in both_parts and (name not in causal or name in masked)
    ]  # fmt: skip
    return {
        **{name: (name, "decoder") for name in causal},
        **{f"{name} (encoder-decoder)": (name, "encoder-decoder") for name in both_parts},
        **{f"{name} (encoder)": (name, "encoder") for name in encoders},
    }


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def outcome(check: Callable[[], str]) -> str:
    """`exact` and perhaps how, or what went wrong."""
    try:
        return check()
    except InputError as error:
        return f"refused: {one_line(error)}"
    except Wrong as error:
        return f"WRONG: {one_line(error)}"
    except Exception as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
        return f"TRACEBACK: {type(error).__name__}: {one_line(error)} ({Path(own.filename).name}:{own.lineno})"


def check_family(name: str, checks: list[str], result: Path) -> None:
    """Checks of one of `kinds_of_models`; writes their outcomes to a JSON file."""
    model_type, kind = kinds_of_models()[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        outcomes: dict[str, str] = {}
        try:
            tiny_model(model_type, kind).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            if kind == "decoder":
                AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:
            traceback.print_exc()
            outcomes["built"] = f"{type(error).__name__}: {one_line(error)}"
        else:
            for what in checks:
                check, model_args = CHECKS[what]
                if kind == "encoder" and check is not check_reward:
                    continue
                own = Path(scratch) / what.replace(" ", "_")
                found = outcome(lambda: check(folder, model_args, own))  # noqa: B023
                outcomes[what] = found.replace(f"{scratch}/", "")
        result.write_text(json.dumps(outcomes, indent=1))


def in_process(model_type: str, checks: list[str], results: Path, timeout: float) -> dict[str, str]:
    """The outcomes of a model type, from a process of its own; what it prints goes to a .log file."""
    file = results / f"{model_type}.json"

    def run() -> None:
        with (results / f"{model_type}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        check_family(model_type, checks, file)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        file.write_text(json.dumps({checks[0]: f"WRONG: took more than {timeout:.0f} s"}))
    if not file.exists():
        file.write_text(json.dumps({checks[0]: f"WRONG: the process ended with code {process.exitcode}"}))
    return json.loads(file.read_text())


def verdict(text: str) -> str:
    """One word for the outcome of a check."""
    return "exact" if text.startswith("exact") else text.split(":")[0]


def summary(outcomes: dict[str, str]) -> str:
    """Each check of a model type with its verdict."""
    if "built" in outcomes:
        return "not built"
    return ", ".join(f"{check} {verdict(text)}" for check, text in outcomes.items())


def count(results: dict[str, dict[str, str]], check: str, kind: str) -> str:
    """How many models of a kind have each verdict in a check: `180 exact, 3 refused`."""
    every = kinds_of_models()
    chosen = [outcomes for name, outcomes in results.items() if every[name][1] == kind]
    words = [verdict(outcomes[check]) for outcomes in chosen if check in outcomes]
    if not words:
        return ""
    words += ["not built"] * sum("built" in outcomes for outcomes in chosen)
    return ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))


def table(results: dict[str, dict[str, str]]) -> str:
    """The page docs/families.md."""
    page = io.StringIO()
    print("# Families of language models\n", file=page)
    print(
        f"Written by `make families` with transformers {transformers.__version__}, TRL {trl.__version__}, PEFT "
        f"{peft.__version__} and torch {torch.__version__} on {datetime.date.today()}. A tiny random model of each "
        "model type goes through PPO, SFT and reward training, and is compared with plain transformers row by row "
        "(tests/families.py says how). Encoders are reward models only. *refused* and *not built* have the line below "
        "the table. transformers has no sequence classifier for many types: these make no reward model, and all else "
        "works.\n", file=page,
    )  # fmt: skip
    kinds = ("decoder", "encoder-decoder", "encoder")
    numbers = [sum(kinds_of_models()[name][1] == kind for name in results) for kind in kinds]
    heads = [f"{kind} ({number})" for kind, number in zip(kinds, numbers, strict=True)]
    print("| check | " + " | ".join(heads) + " |\n|-" + "|-" * len(kinds) + "|", file=page)
    for check in CHECKS:
        print(f"| {check} | " + " | ".join(count(results, check, kind) for kind in kinds) + " |", file=page)
    print("\n| model type | " + " | ".join(CHECKS) + " |\n|-" + "|-" * len(CHECKS) + "|", file=page)
    lines: dict[str, int] = {}
    for name, outcomes in results.items():
        if "built" in outcomes:
            cells = [f"not built [{lines.setdefault(outcomes['built'], len(lines) + 1)}]"] + [""] * (len(CHECKS) - 1)
        else:
            cells = [
                text
                if text.startswith("exact") or not text
                else f"{verdict(text)} [{lines.setdefault(without_type(text, name), len(lines) + 1)}]"
                for text in (outcomes.get(check, "") for check in CHECKS)
            ]
        print(f"| {name} | " + " | ".join(cells) + " |", file=page)
    print(file=page)
    for text, number in lines.items():
        print(f"{number}. {text}", file=page)
    return page.getvalue()


def without_type(text: str, name: str) -> str:
    """A line that several model types share, with `<model type>` where each has its own name."""
    model_type = kinds_of_models()[name][0]
    return text.replace(f"of type {model_type}.", "of type <model type>.").removeprefix("refused: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE", help="these alone, anew; docs/ is left as it is")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="of those of --only")
    parser.add_argument("--again", action="store_true", help="check all anew")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one model type")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "outputs" / "families")
    arguments = parser.parse_args()
    results = arguments.results_dir
    results.mkdir(parents=True, exist_ok=True)
    found = {}
    every = kinds_of_models()
    only = arguments.only and [name for name in every if {name, every[name][0]} & {*arguments.only}]
    for model_type in every if only is None else only:
        file = results / f"{model_type}.json"
        if arguments.only or arguments.again or not file.exists():
            file.unlink(missing_ok=True)
            began = time.monotonic()
            in_process(model_type, arguments.checks, results, arguments.timeout)
            seconds = f" ({time.monotonic() - began:.0f} s)"
        else:
            seconds = ""
        found[model_type] = json.loads(file.read_text())
        print(f"{model_type}: {summary(found[model_type])}{seconds}", flush=True)
        for name, text in found[model_type].items():
            if not text.startswith("exact"):
                print(f"    {name}: {text}", flush=True)
    if not arguments.only:
        (ROOT / "docs" / "families.md").write_text(table(found), encoding="utf-8")
    bad = [name for name, outcomes in found.items() if {"WRONG", "TRACEBACK"} & {*map(verdict, outcomes.values())}]
    sys.exit(f"{len(bad)} of {len(found)} are wrong: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
