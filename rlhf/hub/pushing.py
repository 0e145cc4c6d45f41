"""Pushing to the Hub.

The recipes push what others can use and nothing else: the adapter or model, its tokenizer and its card. The Trainer's
own push would also send `training_args.bin`, a pickle that holds paths of this machine.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from huggingface_hub import HfApi, ModelCard, constants, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from rlhf.errors import InputError
from rlhf.hub.lineage import origin_of, public_base
from rlhf.models.sources import Source
from rlhf.run.files import digest, read_json, write_json
from rlhf.run.folders import Pushed, command, note_in_run, read_run
from rlhf.run.processes import main_process

MODEL_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "README.md", "training.png", "calibration.png",
)  # fmt: skip


TIMEOUT = 120.0  # seconds without a word from the Hub
AGAIN = "The run folder is complete; the same command pushes again, without training"


class PushRequest(NamedTuple):
    """Where to push, checked before training starts."""

    repo_id: str
    token: str
    private: bool | None
    branch: str | None = None  # None: main


class HubFlags(Protocol):
    """The flags of a push, of TrainingArguments and recipes/collect.py."""

    push_to_hub: bool
    hub_model_id: str | None
    hub_token: str | None
    hub_private_repo: bool | None


def take_push_request(args: HubFlags) -> PushRequest | None:
    """Return what `--push_to_hub` asks for, or None, and set it to False, so that the Trainer doesn't push.

    The token is taken out of `args`, which trainers save.

    Raises:
        InputError: if the repo's name or a token is missing, or the Hub can't be reached by this machine's settings.
    """
    given, args.hub_token = args.hub_token, None
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    token = given or get_token()
    if not args.hub_model_id:
        raise InputError("--push_to_hub needs --hub_model_id, for example --hub_model_id you/my-adapter.")
    try:
        validate_repo_id(args.hub_model_id)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {args.hub_model_id}: no name for a Hub repo ({error}).") from error
    if not token:
        raise InputError("--push_to_hub: no Hub token found. Log in with `hf auth login`, or set HF_TOKEN.")
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push_to_hub: HF_HUB_OFFLINE is set. Unset it, or leave the flag out.")
    branch = getattr(args, "hub_revision", None)
    return PushRequest(args.hub_model_id, token, args.hub_private_repo, None if branch == "main" else branch)


def prepare_repo(request: PushRequest | None, repo_type: str = "model") -> None:
    """Create the repo before training, and ask whether the token may write to it.

    Raises:
        InputError: if the Hub refuses.
    """
    if request is None or not main_process():
        return
    api = HfApi(token=request.token)
    with _one_line(request, "Nothing was trained yet. Mend it, or leave the flag out"):
        _create_repo(api, request, repo_type)
        api.auth_check(request.repo_id, repo_type=repo_type, write=True)  # an existing repo may be somebody else's


def _create_repo(api: HfApi, request: PushRequest, repo_type: str) -> None:
    api.create_repo(request.repo_id, repo_type=repo_type, private=request.private, exist_ok=True)
    if request.branch:
        api.create_branch(request.repo_id, branch=request.branch, repo_type=repo_type, exist_ok=True)


@contextmanager
def _one_line(request: PushRequest, advice: str) -> Iterator[None]:
    """Turn whatever the Hub or the network does into an InputError."""
    get_session().timeout = TIMEOUT  # the client's own default is to wait forever
    try:
        yield
    except Exception as error:  # refusals and network faults have many classes
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(".")
        reason = reason.replace(request.token, "...")
        raise InputError(f"--push_to_hub {request.repo_id}: the Hub refused or failed ({reason}). {advice}.") from error


def already_pushed(output_dir: str, request: PushRequest) -> bool:
    """Whether run.json says that this run is in this repo, on this branch."""
    run = read_run(Path(output_dir))
    if run is None or "hub" not in run:
        return False
    return (run["hub"]["name"], run["hub"].get("branch")) == (request.repo_id, request.branch)


def _note_push(output_dir: str, request: PushRequest, commit: str) -> None:
    pushed: Pushed = {"name": request.repo_id, "revision": commit, "branch": request.branch}
    note_in_run(output_dir, "hub", pushed)


def push_model(output_dir: str, request: PushRequest | None) -> None:
    """Push a finished run's model, tokenizer and card, and check that the weights arrived unchanged.

    Raises:
        InputError: if the Hub refuses, or if the weights on the Hub differ from those that were sent.
    """
    if request is None or not main_process() or already_pushed(output_dir, request):
        return
    with tempfile.TemporaryDirectory() as staging:
        for pattern in MODEL_FILES:
            for file in Path(output_dir).glob(pattern):
                shutil.copy2(file, staging)
        _hide_local_base(Path(staging))
        commit = _upload(staging, request, "model")
        weights = next(Path(staging).glob("*.safetensors"))
        with _one_line(request, AGAIN):
            received = hf_hub_download(request.repo_id, weights.name, revision=commit, token=request.token)
        if digest(received) != digest(str(weights)):
            raise InputError(
                f"--push_to_hub {request.repo_id}: {weights.name} came back from the Hub with other content than was "
                f"sent. {AGAIN}."
            )
    _note_push(output_dir, request, commit)
    print(f"Pushed to {request.repo_id} at {commit}.")


def push_dataset(output_dir: str, recipe: str, request: PushRequest | None, source: Source) -> None:
    """Push train.jsonl and test.jsonl as a dataset with a card.

    Raises:
        InputError: if the Hub refuses.
    """
    if request is None or not main_process() or already_pushed(output_dir, request):
        return
    with tempfile.TemporaryDirectory() as staging:
        for name in ("train.jsonl", "test.jsonl"):
            shutil.copy2(Path(output_dir) / name, staging)
        sampled = origin_of(source.name, source.adapter, source.revision)
        (Path(staging) / "README.md").write_text(
            f"---\ntags: [rlhf-recipes, preference]\n---\n# {request.repo_id}\n\nPreference pairs made by "
            f"`recipes/collect.py` of rlhf-recipes: `prompt`, `chosen`, `rejected`, `labeler`, `certainty`, `model`."
            f"\n\nReplies sampled from {sampled.name} ({sampled.revision or sampled.sha256 or ''}).\n\n"
            f"```\n{command(recipe)}\n```\n",
            encoding="utf-8",
        )
        commit = _upload(staging, request, "dataset")
    _note_push(output_dir, request, commit)
    print(f"Pushed to the dataset {request.repo_id} at {commit}.")


def _hide_local_base(folder: Path) -> None:
    """Replace local paths in the configs by public names."""
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        file = folder / name
        config = read_json(file) or {}
        if config.get(key):
            write_json(file, {**config, key: public_base(config[key])})


def _upload(folder: str, request: PushRequest, repo_type: str) -> str:
    api = HfApi(token=request.token)
    with _one_line(request, AGAIN):
        _create_repo(api, request, repo_type)
        if repo_type == "model":
            ModelCard.load(Path(folder) / "README.md").validate()
        info = api.upload_folder(
            repo_id=request.repo_id, folder_path=folder, repo_type=repo_type, revision=request.branch,
            commit_message="Push with rlhf-recipes",
        )  # fmt: skip
    return info.oid
