"""Completions by the engine that the flags choose, for the commands that only sample."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.continuous_batching import ContinuousBatching
from rlhf.engines.seam import TOLERANCE, Completions, Decoding, Engine, need_decoder
from rlhf.engines.vllm_sampling import FILES, PolicyFiles
from rlhf.engines.vllm_server import ServedModel, Server, VLLMServer
from rlhf.errors import InputError
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source, base_config
from rlhf.models.tokenizers import end_ids

Model: TypeAlias = PreTrainedModel | PeftModel
CHECKED = 8  # completions whose log-probabilities are computed again


class Sampler:
    """`sample_completions` of rlhf/models/generation.py by another engine.

    Args:
        folder: where adapters are written for a server.
        trains: the models change between calls, so a server has to take whole models as well.

    Raises:
        InputError: if a server isn't up in time.
    """

    def __init__(self, args: SamplerArguments, folder: str, trains: bool = False) -> None:
        self.args, self.folder, self.trains = args, Path(folder), trains
        self.newest: tuple[Model, Engine] | None = None  # a loop asks one model again and again
        self.server = Server(args.vllm_url) if args.use_vllm else None
        if self.server:
            self.server.wait(args.vllm_server_timeout)

    def __call__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        sampling: Sampling,
        do_sample: bool,
        num_return_sequences: int,
    ) -> list[list[list[int]]]:
        """See `sample_completions`.

        Raises:
            InputError: if the engine can't sample this model, or samples another one.
        """
        if not prompts:
            return []
        engine = self._engine(model, tokenizer, sampling, max(len(prompt) for prompt in prompts))
        each = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        uniforms = torch.rand(
            len(each), sampling.max_new_tokens, generator=torch.Generator().manual_seed(sampling.seed)
        )
        temperature = sampling.temperature if do_sample else 0.0
        decoding = Decoding(sampling.max_new_tokens, temperature, end_ids(model, tokenizer), [])
        engine.sync()
        few = each[:CHECKED]
        drawn = decoding._replace(temperature=sampling.temperature)  # the most likely tokens tell less of the weights
        check_weights(model, few, engine.sample(few, drawn, uniforms[:CHECKED]), sampling.temperature, engine.advice)
        found = engine.sample(each, decoding, uniforms)
        rows = [row[:length] for row, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]
        return [rows[start : start + num_return_sequences] for start in range(0, len(rows), num_return_sequences)]

    def _engine(self, model: Model, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, longest: int) -> Engine:
        if self.server:
            flag = "--max_completion_length" if self.trains else "--max_new_tokens"  # of rloo.py and of the others
            self.server.need_room(longest, sampling.max_new_tokens, flag)
        known, engine = self.newest or (None, None)
        sends = not isinstance(engine, VLLMServer) or engine.files.sends(model)
        if engine is None or known is not model or not sends:
            if isinstance(engine, VLLMServer):
                engine.close()
            engine = self._new_engine(model, tokenizer, sampling.batch_size)
            self.newest = model, engine
        return engine

    def _new_engine(self, model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Engine:
        server = self.server
        need_decoder(model.config, self.args.sampler_flag)
        if server is None:
            options = self.args.transformers_continuous_batching_config
            assert not isinstance(options, str)
            return ContinuousBatching(model, tokenizer, batch_size, options)
        adapter = model.active_adapter if isinstance(model, PeftModel) else ""
        if not adapter and not self.trains:
            own = model.config._name_or_path
            return ServedModel(server, server.need_model(own), own, tokenizer)
        state = PartialState(cpu=not torch.accelerator.is_available())
        return VLLMServer(server, PolicyFiles(model, adapter, self.folder / FILES, state), tokenizer, state)


def make_sampler(
    args: SamplerArguments, folder: str, sources: Sequence[Source], trains: bool = False
) -> Callable[..., list[list[list[int]]]] | None:
    """What samples in place of the project's own loop, if the flags ask for anything; see `Sampler`.

    Args:
        sources: of the models that will sample, none of them loaded yet.
        trains: see `Sampler`.

    Raises:
        InputError: if the engine can't sample one of them, or a server isn't up in time.
    """
    if not (args.use_vllm or args.use_transformers_continuous_batching):
        return None
    for source in sources:
        need_decoder(base_config(source), args.sampler_flag)
    sampler = Sampler(args, folder, trains)
    for source in sources:
        if sampler.server and source.adapter is None and not trains:
            sampler.server.need_model(source.base)
    return sampler


@torch.no_grad()
def check_weights(model: Model, prompts: list[list[int]], found: Completions, temperature: float, advice: str) -> None:
    """Refuse an engine with other weights: an adapter that never arrived, or another base.

    Args:
        found: completions of the prompts, drawn at the temperature.
        advice: what to look at, in a sentence.

    Raises:
        InputError: with the difference.
    """
    differences = []
    for prompt, row, logprobs, length in zip(prompts, found.tokens, found.logprobs, found.lengths, strict=True):
        ids = torch.tensor([prompt + row[:length].tolist()], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu() / temperature
        own = logits.log_softmax(-1).gather(1, row[:length, None].cpu())[:, 0]
        differences.append((own - logprobs[:length].cpu()).abs())
    together = torch.cat(differences)
    together = together[~together.isnan()]
    if not len(together):
        raise InputError(f"The engine gave no log-probability of any token. {advice}")
    if not together.mean() <= TOLERANCE:
        raise InputError(
            f"The engine's log-probabilities differ from the model's by {float(together.mean()):.2g} nats per token: "
            f"it samples from other weights or at another temperature. {advice}"
        )
