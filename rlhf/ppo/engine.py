"""The engine that the flags choose for a policy."""

import functools
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.engines.continuous_batching import ContinuousBatching
from rlhf.engines.own_loop import OwnLoop
from rlhf.engines.seam import Engine, need_decoder
from rlhf.engines.vllm_sampling import FILES, PolicyFiles, need_renewal
from rlhf.engines.vllm_server import Server, VLLMServer
from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.sharding import policy_weights, whole


def need_engine(args: PPOConfig, config: PreTrainedConfig, use_peft: bool) -> Server | None:
    """Wait until the vLLM server is up, if one samples. This takes no model, so it comes before they are loaded.

    Args:
        config: of the policy.
        use_peft: whether the policy is an adapter.

    Raises:
        InputError: if the engine can't sample such a policy, the server isn't up in time, or there is no vLLM to sample
            in this process.
    """
    if args.use_vllm or args.use_transformers_continuous_batching:
        need_decoder(config, args.sampler_flag)
    if not args.use_vllm:
        return None
    if not use_peft:
        need_renewal(config, args.device)
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
    model: PolicyAndValue,
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
    policy, batch_size = model.policy, args.local_rollout_forward_batch_size
    if not (args.use_vllm or args.use_transformers_continuous_batching):
        return OwnLoop(policy, tokenizer, batch_size, accelerator)
    server = need_engine(args, policy.config, isinstance(policy, PeftModel))
    if not args.use_vllm:
        options = args.transformers_continuous_batching_config
        assert not isinstance(options, str)
        if model.layer_by_layer:
            raise InputError(f"{args.sampler_flag}: samples with whole weights. Leave it out, or leave "
                             "--ds3_gather_for_generation at true.")  # fmt: skip
        return whole(lambda: ContinuousBatching(policy, tokenizer, batch_size, options), model)
    weights = functools.partial(policy_weights, model)
    files = PolicyFiles(policy, adapter, Path(args.output_dir) / FILES, accelerator, weights)
    if server is None:
        from rlhf.engines.vllm_colocated import ColocatedVLLM

        room = longest + args.response_length
        return ColocatedVLLM(args, files, tokenizer, accelerator, room, batch_size)
    server.need_room(longest, args.response_length, "--response_length")
    return VLLMServer(server, files, tokenizer, accelerator)
