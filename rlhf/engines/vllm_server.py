"""A vLLM server: `vllm serve`, a process of its own, perhaps on other GPUs, asked over its OpenAI-compatible HTTP API.

With LoRA the policy's adapter travels, a few MB: `sync` writes it to a folder that the server can read too, and has it
loaded under a name that was never used before, so that no answer can come from older weights. A policy that is trained
as a whole travels whole, and replaces the server's weights. Prompts go and completions come as token ids.
https://docs.vllm.ai/en/latest/features/lora.html
"""

import atexit
import functools
import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlhf.engines.seam import Completions, Decoding, Stops, completions_of
from rlhf.engines.vllm_sampling import PolicyFiles, ended_at, sampling_settings, seeds_of
from rlhf.errors import InputError
from rlhf.run.processes import main_process

REQUESTS = 64  # that are under way at once, of each process; the server batches what is there
SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
PATIENCE = 3600  # seconds for one answer


class _Refusal(Exception):
    """The server answered with an error."""


class Server:
    """The HTTP side: a vLLM server by its address.

    Args:
        url: such as http://127.0.0.1:8000.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # not through a proxy: the server is on this machine or in its network
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers, or its text.

        Args:
            body: to POST; None: GET.

        Raises:
            _Refusal: if the answer is an error.
            InputError: if there is no answer.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=PATIENCE) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise _Refusal(_reason(error.code, error.read().decode(errors="replace"))) from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"--use_vllm true: the server {self.url} does not answer ({error}). Start it, or give its address "
                "with --vllm_server_base_url. The same command continues the run."
            ) from error
        with suppress(ValueError):
            return json.loads(text)
        return text

    def wait(self, seconds: float) -> None:
        """Wait until the server is up.

        Raises:
            InputError: if it is not after so many seconds.
        """
        end, said = time.monotonic() + seconds, False
        while True:
            try:
                self.ask("/health")
                return
            except _Refusal:
                return
            except InputError:
                if time.monotonic() >= end:
                    raise
                if not said and main_process():
                    print(
                        f"Waiting up to {seconds:g} s (--vllm_server_timeout) for the vLLM server {self.url} ...",
                        flush=True,
                    )
                said = True
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def served(self) -> tuple[str, str, int | None]:
        """The name and the path of the model that it serves, and its longest context in tokens.

        Raises:
            InputError: if this is no vLLM server.
        """
        try:
            models = self.ask("/v1/models")["data"]
            found = next(model for model in models if not model.get("parent"))
            return found["id"], found.get("root") or found["id"], found.get("max_model_len")
        except (_Refusal, KeyError, TypeError, StopIteration) as error:
            raise InputError(f"--use_vllm true: {self.url} is no vLLM server. Give the address of one.") from error

    def need_model(self, path: str) -> str:
        """The server's name for a whole model.

        Args:
            path: folder or Hub id.

        Raises:
            InputError: if it serves another one.
        """
        name, served, _ = self.served()
        if served != path and Path(served).absolute() != Path(path).absolute():
            raise InputError(
                f"--use_vllm true: the server {self.url} serves {served}, and {path} is to sample. Only adapters are "
                "sent to it. Start it with that model, or leave the flag out."
            )
        return name

    def need_room(self, prompt_tokens: int, new_tokens: int, flag: str) -> None:
        """Refuse completions that are longer than the server's context.

        Args:
            prompt_tokens: of the longest prompt.
            flag: that says `new_tokens`.

        Raises:
            InputError: with both lengths.
        """
        _, _, context = self.served()
        if context is not None and prompt_tokens + new_tokens > context:
            raise InputError(
                f"{flag} {new_tokens}: the longest prompt has {prompt_tokens} tokens, together more than the server's "
                f"{context}. Start it with a larger --max-model-len."
            )


def _reason(code: int, text: str) -> str:
    """The sentence in an error of the server.

    >>> _reason(400, '{"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}}')
    'LoRA rank 64 is greater than max_lora_rank 16.'
    """
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(text)
        return str(found["error"]["message"] if isinstance(found.get("error"), dict) else found["detail"])
    return f"HTTP {code} {text[:200]}".strip()


class ServedModel:
    """Sampling by a vLLM server from the model that it serves.

    Args:
        name: the server's name for what samples.
        base: the model that the server must serve.
        flags: of its command, beside the model.
    """

    exact, own_weights = False, True

    def __init__(
        self, server: Server, name: str, base: str, tokenizer: PreTrainedTokenizerBase, flags: str = ""
    ) -> None:
        self.server, self.name, self.tokenizer = server, name, tokenizer
        self.command = f"vllm serve {base} --host 127.0.0.1 {flags}--logprobs-mode processed_logprobs"
        self.advice = f"The server must serve {base}. Start it as: {self.command}"

    def sync(self) -> None:
        """Nothing to do: the server has the model's weights."""

    def sample(self, prompts: list[list[int]], decoding: Decoding, uniforms: torch.Tensor) -> Completions:
        """See `Engine`. Each row is a request with a seed of its own."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            choices = list(pool.map(functools.partial(self._complete, decoding), prompts, seeds_of(uniforms)))
        rule = Stops(decoding, self.tokenizer)
        found = [read_choice(choice, prompt, rule) for choice, prompt in zip(choices, prompts, strict=True)]
        tokens, logprobs, ended = (list(part) for part in zip(*found, strict=True))
        return completions_of(tokens, logprobs, ended, self.tokenizer.pad_token_id, uniforms.device)

    def _complete(self, decoding: Decoding, prompt: list[int], seed: int) -> dict[str, Any]:
        try:
            return self.server.ask("/v1/completions", request_body(self.name, prompt, seed, decoding))["choices"][0]
        except _Refusal as refusal:
            raise InputError(f"--use_vllm true: the server {self.server.url} refused a prompt: {refusal}") from refusal


class VLLMServer(ServedModel):
    """Sampling by a vLLM server with the policy's weights: an adapter over the server's model, or all of them.

    Args:
        server: one that serves the policy's base, or for a whole model any of the same architecture.
        files: the policy.
        state: of the processes that sample together.
    """

    def __init__(
        self,
        server: Server,
        files: PolicyFiles,
        tokenizer: PreTrainedTokenizerBase,
        state: Accelerator | PartialState,
    ) -> None:
        self.files, self.state = files, state
        flags = f"--enable-lora --max-lora-rank {files.rank} " if files.is_adapter else ""
        super().__init__(server, "", files.base, tokenizer, flags)
        variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if files.is_adapter else "VLLM_SERVER_DEV_MODE=1"
        self.command = f"{variable} {self.command}"
        self.advice = f"The server must serve the policy's base model. Start it as: {self.command}"
        if not files.is_adapter:
            self._need_same_sizes()
        if state.is_main_process:
            atexit.register(self.close)

    def _need_same_sizes(self) -> None:
        """Refuse a server of a model of another size, whose weights vLLM would replace in part.

        Raises:
            InputError: naming a size.
        """
        path, own = self.server.served()[1], self.files.policy.config.get_text_config().to_dict()
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception:  # the server's folder may be one that only it can read
            return
        served = config.get_text_config().to_dict()
        for name in SIZES:
            if served.get(name) != own.get(name):
                raise InputError(
                    f"--use_vllm true: the server {self.server.url} serves {path} with {name} {served.get(name)}; "
                    f"the policy has {own.get(name)}. Start it as: {self.command}"
                )

    def close(self) -> None:
        """Have the server forget the policy, or give it back the weights of the model that it says to serve."""
        atexit.unregister(self.close)
        if not self.state.is_main_process:
            return
        self._unload()
        if self.files.number and not self.files.is_adapter:
            with suppress(_Refusal, InputError):  # it may have ended before
                self._reload(self.server.served()[1])

    def sync(self) -> None:
        """See `Engine`."""
        if self.state.is_main_process:
            self._unload()
        place = self.files.renew(self.state.is_main_process)
        self.name = self.files.name if self.files.is_adapter else self.server.served()[0]
        if self.state.is_main_process:
            what = "adapter" if self.files.is_adapter else "weights"
            try:
                self._load(place)
            except _Refusal as refusal:
                raise InputError(
                    f"--use_vllm true: the server {self.server.url} did not load the policy's {what} ({refusal}). "
                    f"It must read {place} and be started as: {self.command}"
                ) from refusal
        self.state.wait_for_everyone()

    def _load(self, place: Path) -> None:
        if self.files.is_adapter:
            self.server.ask("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(place)})
            return
        try:
            self._reload(str(place))
        finally:
            self.files.remove()  # the server has read them

    def _reload(self, path: str) -> None:
        self.server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        self.server.ask("/reset_prefix_cache", {})  # keys and values of the old weights

    def _unload(self) -> None:
        """Have the server forget the adapter of the last `sync`, and remove its folder."""
        if self.files.remove() and self.files.is_adapter:
            with suppress(_Refusal, InputError):  # a server that was started anew never had it
                self.server.ask("/v1/unload_lora_adapter", {"lora_name": self.name})


def request_body(model: str, prompt: list[int], seed: int, decoding: Decoding) -> dict[str, Any]:
    """The body of a request for one completion."""
    own = {"model": model, "prompt": prompt, "seed": seed, "return_token_ids": True}
    return own | sampling_settings(decoding)


def read_choice(choice: dict[str, Any], prompt: list[int], stops: Stops) -> tuple[list[int], list[float], bool]:
    """Tokens, log-probabilities and whether the completion ended, from the `choices` of an answer.

    Raises:
        InputError: if the server sent no token ids or no log-probabilities.
    """
    tokens, given = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not tokens or given is None or len(given) != len(tokens):
        raise InputError(
            "--use_vllm true: the server sent no token ids with log-probabilities. It takes vLLM 0.11 or newer."
        )
    return ended_at(prompt, tokens, given, choice.get("finish_reason"), stops)
