"""TRL's SFT losses, where they are not the model's own."""

import os

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl import SFTConfig
from trl.trainer import utils

from rlhf.errors import InputError
from rlhf.models.causality import embedded
from rlhf.models.checks import agreed, made_whole
from rlhf.models.prefix import CANNOT, reraise_out_of_memory

FUSED = hasattr(utils, "add_fused_lm_head")  # TRL 1.15 and later: no other loss than that of its own head


@made_whole()
@torch.no_grad()
def fit_loss(args: SFTConfig, model: PreTrainedModel | PeftModel) -> None:
    """Change `loss_type` and `router_aux_loss_coef` where SFTTrainer would compute another loss than the model's own.

    TRL's `chunked_nll` takes the last hidden states through the head by itself. It doesn't know what some models do in
    between (Granite divides the logits, BERT has a layer more), and fails with others; these get `nll`. Mixtures of
    experts that have no loss for their routers get none. Both are tried once on a few tokens; the model is as before.

    From 1.15 on, TRL knows more models, but has no other way for the rest.

    Raises:
        InputError: if the model's own loss is needed and fails (GIT's, without an image), or TRL would take another.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if whole.config.is_encoder_decoder:
        return
    config, training, forward = whole.config.get_text_config(), whole.training, vars(whole).get("forward")
    router = getattr(config, "output_router_logits", None)
    ids = torch.arange(16, device=whole.device)[None] % (embedded(whole) - 1) + 1
    whole.eval()
    try:
        if router is not None:
            config.output_router_logits = args.router_aux_loss_coef != 0  # as SFTTrainer sets it
        own = _tried(whole, ids)
        if router is not None and getattr(own, "aux_loss", None) is None:
            args.router_aux_loss_coef, config.output_router_logits = 0.0, False
            own = _tried(whole, ids)
        # from the logits: some classes don't shift the labels of their own loss (BartForCausalLM)
        expected = cross_entropy(whole(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])
        chunked = _in_pieces(whole, ids)
        if chunked is not None and router is not None:
            config.output_router_logits = False
            chunked = _in_pieces(whole, ids)
    finally:
        vars(whole).pop("forward", None)
        if forward is not None:  # accelerate's hooks
            whole.forward = forward
        if router is not None:
            config.output_router_logits = router
        whole.train(training)
    rounding = 1e-2 if whole.dtype in (torch.bfloat16, torch.float16) else 1e-4
    same = chunked is not None and bool(torch.isclose(chunked.float(), expected, rtol=rounding))
    same, has_loss, args.router_aux_loss_coef = agreed((same, own is not None, args.router_aux_loss_coef))
    if _gathers_a_trained_head(model):
        if FUSED or config.tie_word_embeddings:
            raise InputError(
                "--lora_modules_to_save: under FSDP2, gradients of embeddings that are tied to the head go wrong "
                "beside an adapter, and with TRL 1.15 and later those of a head too. Leave it out, or launch with "
                "recipes/accelerate/ddp.yaml or zero3.yaml."
            )
        args.loss_type = "nll"
    if FUSED and not same:
        raise InputError(
            f"--model_name_or_path: from 1.15 on, TRL takes another loss than that of {type(whole).__name__}. Install "
            "trl 1.12.0, or give another model."
        )
    if args.loss_type == "chunked_nll" and not same:
        args.loss_type = "nll"
    if args.loss_type == "nll" and not has_loss and not FUSED:
        raise InputError(f"--loss_type nll: {type(whole).__name__} has no loss for text alone. Give another model.")


def _gathers_a_trained_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether TRL's own loss would gather weights that FSDP2 has spread, and drop the other processes' gradients.

    It takes `full_tensor()` of the head, which it still finds spread beside an adapter.
    """
    if not isinstance(model, PeftModel) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    whole = model.get_base_model()
    ends = [whole.get_input_embeddings(), whole.get_output_embeddings()]  # perhaps tied
    return any(weight.requires_grad for part in ends if part is not None for weight in part.parameters())


def _in_pieces(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """The loss of ids (1, L) as SFTTrainer computes it from the last hidden states; None if that fails."""
    if FUSED:
        utils.add_fused_lm_head(model)
        output = _tried(model, ids, fused_lm_head=True)
        return None if output is None else output.loss
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    routed = getattr(config, "output_router_logits", False)
    try:
        output = model.base_model(input_ids=ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
        logits = linear(output.last_hidden_state, head.weight, head.bias).float()
        if routed:  # SFTTrainer adds it by these names of the configuration, which some families lack
            load_balancing_loss_func(output.router_logits, config.num_experts, config.num_experts_per_tok)
    except CANNOT as error:
        reraise_out_of_memory(error)
        return None
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier"))
    logits = logits * next((factor for factor in factors if factor is not None), 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return cross_entropy(logits[0, :-1], ids[0, 1:])


def _tried(model: PreTrainedModel, ids: torch.Tensor, **settings: bool) -> ModelOutput | None:
    """The output with the loss of ids (1, L), or None if that fails."""
    try:
        return model(input_ids=ids, labels=ids, use_cache=False, **settings)
    except CANNOT as error:
        reraise_out_of_memory(error)
        return None
