"""The flags that choose an engine, by TRL's names (those of GRPOConfig)."""

import json
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from rlhf.errors import InputError
from rlhf.run.ranges import Port, PositiveFloat, PositiveInt, Range

CONTINUOUS_BATCHING = "--use_transformers_continuous_batching true"
OWN_FIELDS = {"seed", "return_logprobs"}  # of ContinuousBatchingConfig
OWN = "--seed decides what is drawn, and log-probabilities are always needed"
COLOCATED = {"vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode"}
COUNTS = {"page_size", "block_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch"}


@dataclass
class SamplerArguments:
    """Which engine samples. Without one of these, the project's own loop.

    Args:
        use_vllm: vLLM samples.
        vllm_mode: a server, or in the process that trains (see `EngineArguments`).
        vllm_server_base_url: replaces `vllm_server_host` and `vllm_server_port`.
        vllm_server_timeout: seconds to wait at the start until the server is up.
        use_transformers_continuous_batching: transformers' continuous batching samples.
        transformers_continuous_batching_config: fields of ContinuousBatchingConfig. By default the cache has room for
            as many rows as the own loop samples at once.

    Raises:
        InputError: for settings that can't work.
    """

    use_vllm: bool = field(default=False, metadata={"help": "Sample completions with vLLM."})
    vllm_mode: Literal["server", "colocate"] = field(
        default="server",
        metadata={"help": "'server': start it with 'vllm serve'. 'colocate': in PPO's own process and GPU."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Address of the vLLM server, such as http://127.0.0.1:8000."}
    )
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the vLLM server."})
    vllm_server_port: Port = field(default=8000, metadata={"help": "Port of the vLLM server."})
    vllm_server_timeout: PositiveFloat = field(
        default=240.0, metadata={"help": "Seconds to wait at the start until the vLLM server is up."}
    )
    use_transformers_continuous_batching: bool = field(
        default=False, metadata={"help": "Sample completions with transformers' continuous batching."}
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of ContinuousBatchingConfig, as JSON."}
    )

    def __post_init__(self) -> None:
        self.check_sampler()
        after = getattr(super(), "__post_init__", None)  # of a trainer's own settings
        if after is not None:
            after()

    @property
    def sampler_flag(self) -> str:
        """What chose the engine, as it is typed."""
        return "--use_vllm true" if self.use_vllm else CONTINUOUS_BATCHING

    @property
    def colocated(self) -> bool:
        """Whether vLLM samples in this process."""
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def vllm_url(self) -> str:
        """The address of the vLLM server."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    def check_sampler(self) -> None:
        """Raise InputError for settings that can't work; read a JSON object that was typed."""
        if self.colocated and not isinstance(self, EngineArguments):
            raise InputError(
                "--vllm_mode colocate: is for recipes/ppo.py; here only a vLLM server can sample. Start one with 'vllm "
                "serve' (docs/engines.md) and give --vllm_mode server."
            )
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise InputError("--use_vllm and --use_transformers_continuous_batching: exclude each other. Give one.")
        if self.vllm_server_base_url and not self.vllm_server_base_url.startswith(("http://", "https://")):
            raise InputError(
                f"--vllm_server_base_url {self.vllm_server_base_url}: needs an address such as http://127.0.0.1:8000."
            )
        self._check_continuous_batching()

    def _check_continuous_batching(self) -> None:
        flag, options = "--transformers_continuous_batching_config", self.transformers_continuous_batching_config
        if options is None:
            return
        if not self.use_transformers_continuous_batching:
            raise InputError(f"{flag}: has no effect without {CONTINUOUS_BATCHING}.")
        from transformers.generation import ContinuousBatchingConfig

        try:
            options = json.loads(options) if isinstance(options, str) else options
            unknown = sorted(set(options) - {known.name for known in fields(ContinuousBatchingConfig)})
            if unknown:
                raise ValueError(f"unknown field {unknown[0]!r}")
            ContinuousBatchingConfig(**options)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{flag}: {error}. Give fields of ContinuousBatchingConfig as JSON.") from error
        for name in OWN_FIELDS & set(options):
            raise InputError(f"{flag}: {name!r} is not yours to set; {OWN}. Leave it out.")
        for name in COUNTS & set(options):
            if isinstance(options[name], bool) or not isinstance(options[name], int) or options[name] < 1:
                raise InputError(f"{flag}: {name!r} must be a whole number of at least 1, found {options[name]!r}.")
        self.transformers_continuous_batching_config = options


@dataclass
class EngineArguments(SamplerArguments):
    """The engine of PPO's rollouts, and what is done about its other rounding.

    Args:
        vllm_gpu_memory_utilization: share of the GPU's memory for vLLM's weights and cache.
        vllm_max_model_length: tokens of the longest prompt and completion; None: those of the run.
        vllm_enable_sleep_mode: between rollouts vLLM's weights go to the CPU's memory, and its cache goes.
        vllm_importance_sampling_correction: weight each token's policy loss with π / π_engine, with either engine.
        vllm_importance_sampling_mode, vllm_importance_sampling_clip_max, vllm_importance_sampling_clip_min: see
            rlhf.ppo.mismatch.importance_weights.

    Raises:
        InputError: for settings that can't work.
    """

    vllm_gpu_memory_utilization: Annotated[float, Range(above=0, high=1)] = field(
        default=0.3, metadata={"help": "With colocate: share of the GPU's memory for vLLM."}
    )
    vllm_max_model_length: PositiveInt | None = field(
        default=None, metadata={"help": "With colocate: tokens of prompt and completion; None: as many as needed."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "With colocate: vLLM gives the GPU's memory back between rollouts."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Correct for the mismatch between the engine's and the policy's logprobs."}
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        field(
            default="sequence_mask",
            metadata={"help": "Ratio of each token or of the sequence; out of bounds truncated or masked to 0."},
        )
    )
    vllm_importance_sampling_clip_max: PositiveFloat | None = field(
        default=3.0, metadata={"help": "Upper bound of the importance sampling ratio."}
    )
    vllm_importance_sampling_clip_min: PositiveFloat | None = field(
        default=None, metadata={"help": "Lower bound of the importance sampling ratio."}
    )

    def check_sampler(self) -> None:
        """See `SamplerArguments`."""
        super().check_sampler()
        for flag in fields(EngineArguments):
            if flag.name in COLOCATED and getattr(self, flag.name) != flag.default and not self.colocated:
                raise InputError(f"--{flag.name}: has no effect without --use_vllm true --vllm_mode colocate.")

    def check_importance_sampling(self) -> None:
        """Raise InputError for settings that can't work."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise InputError(f"--vllm_importance_sampling_clip_min {low}: must be below clip_max, which is {high}.")
        if self.vllm_importance_sampling_mode.endswith("truncate") and low is None and high is None:
            raise InputError(
                f"--vllm_importance_sampling_mode {self.vllm_importance_sampling_mode}: needs a bound. Give "
                "--vllm_importance_sampling_clip_max or --vllm_importance_sampling_clip_min."
            )
