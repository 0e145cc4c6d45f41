"""The engine that the flags choose for a policy."""

from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf.engines.continuous_batching import ContinuousBatching
from rlhf.engines.own_loop import OwnLoop
from rlhf.engines.seam import Engine, need_decoder
from rlhf.engines.vllm_server import Server, VLLMServer
from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.inputs import Model


def need_engine(args: PPOConfig, use_peft: bool = True) -> Server | None:
    """Wait until the vLLM server is up, if one samples. This takes no model, so it comes before they are loaded.

    Raises:
        InputError: if it isn't up in time, the policy is no adapter, or there is no vLLM to sample in this process.
    """
    if not args.use_vllm:
        return None
    if not use_peft:
        raise InputError(
            "--use_vllm true: only LoRA adapters are sent to vLLM, not whole models. Give --use_peft true."
        )
    if args.colocated and find_spec("vllm") is None:
        raise InputError(
            "--vllm_mode colocate: needs vLLM in this environment. Install rlhf-recipes[vllm], or start a server with "
            "'vllm serve' in another one (docs/engines.md) and give --vllm_mode server."
        )
    if args.colocated:
        return None
    server = Server(args.vllm_url)
    server.wait(args.vllm_server_timeout)
    return server


def make_engine(
    args: PPOConfig,
    policy: Model,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    longest: int,
) -> Engine:
    """The engine of a run.

    Args:
        adapter: the policy's adapter, if it has any.
        longest: tokens of the longest prompt.

    Raises:
        InputError: if the engine can't sample this policy.
    """
    batch_size, folder = args.local_rollout_forward_batch_size, Path(args.output_dir) / "vllm_adapters"
    if not (args.use_vllm or args.use_transformers_continuous_batching):
        return OwnLoop(policy, tokenizer, batch_size, accelerator)
    flag = args.sampler_flag
    if any(getattr(accelerator.state, f"{name}_plugin", None) is not None for name in ("fsdp", "deepspeed")):
        raise InputError(f"{flag}: was never tried under FSDP2 or DeepSpeed. Leave it out, or launch with DDP.")
    need_decoder(policy.config, flag)
    if not args.use_vllm:
        options = args.transformers_continuous_batching_config
        assert not isinstance(options, str)
        return ContinuousBatching(policy, tokenizer, batch_size, options)
    server = need_engine(args, isinstance(policy, PeftModel))
    assert isinstance(policy, PeftModel)
    if server is None:
        from rlhf.engines.vllm_colocated import ColocatedVLLM

        room = longest + args.response_length
        return ColocatedVLLM(args, policy, adapter, tokenizer, folder, accelerator, room, batch_size)
    server.need_room(longest, args.response_length, "--response_length")
    return VLLMServer(server, policy, adapter, tokenizer, folder, accelerator)
