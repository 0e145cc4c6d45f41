"""Whether a model predicts each token from those before it alone."""

import torch
from transformers import PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.checks import has_weights
from rlhf.models.prefix import same

TRIED = 16  # tokens


def need_causal(model: PreTrainedModel, what: str) -> None:
    """Refuse a model that looks ahead: it would learn to copy, and its log-probabilities would mean nothing.

    Args:
        what: the model, as the user gave it, for the message.

    Raises:
        InputError: for a model of the BERT kind whose config doesn't say `is_decoder`, for one that reads in both
            directions, and for attention by random hashes (Reformer). ProphetNet's decoder changes with its length.
    """
    kind = model.config.model_type
    if "lsh" in (getattr(model.config, "attn_layers", None) or []):
        raise InputError(
            f"{what}: the LSH attention of {kind} draws random hashes over what comes later too, so no log-probability "
            "comes out twice. Give another model."
        )
    if has_weights() and looks_ahead(model):
        raise InputError(
            f"{what}: this {kind} model sees the tokens that it should predict: what follows a token changes what it "
            "says before it. Give a causal language model (of the BERT kind: one with is_decoder in its config)."
        )


def embedded(model: PreTrainedModel) -> int:
    """How many tokens have an embedding. An adapter that trains some of these hides the number (PEFT's wrapper)."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "original_module", embeddings).num_embeddings


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether another last token, or fewer tokens, change the logits before. Tried once; the mode is as before."""
    training = model.training
    size = embedded(model)
    # spread over the vocabulary: between its first tokens, special ones, half precision rounds beyond recognition
    ids = (torch.arange(1, TRIED + 1, device=model.device) * (size - 1) // (TRIED + 1)).clamp(min=1).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    model.eval()

    def read(rows: torch.Tensor) -> torch.Tensor:
        if not model.config.is_encoder_decoder:
            return model(input_ids=rows, use_cache=False).logits
        return model(input_ids=ids[:1].expand(len(rows), -1), decoder_input_ids=rows, use_cache=False).logits

    logits, fewer = read(ids), read(ids[:1, : TRIED // 2])
    model.train(training)
    # with as many tokens nothing is rounded otherwise; with fewer, another kernel may sum in another order
    return not (same(logits[1, :-1], logits[0, :-1], half_tolerance=0.03)
                and same(fewer[0], logits[0, : TRIED // 2], half_tolerance=0.5))  # fmt: skip
