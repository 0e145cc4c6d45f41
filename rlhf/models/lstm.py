"""An LSTM language model to compare with the Transformer. Every Auto class of transformers knows it as `lstm`.

Embeddings, a stack of LSTM layers (Hochreiter and Schmidhuber 1997), and an output projection tied to the embeddings.
Importing this module registers it.
"""

import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LSTMConfig(PreTrainedConfig):
    """Sizes of an LSTM language model, under the names that Transformers' configurations use."""

    model_type = "lstm"

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 2
    initializer_range: float = 0.1  # no norm follows the embeddings: with 0.02 the gates' inputs are near 0
    tie_word_embeddings: bool = True
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embeddings, LSTM layers, tied output projection.

    Generation computes the whole text again for each new token. That is fast enough for models of this size.
    """

    config_class = LSTMConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (read as it is by transformers)

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' own, and a forget gate that starts open: bias 1.

        Source: Jozefowicz et al. 2015 (https://proceedings.mlr.press/v37/jozefowicz15.html), section 2.2.
        """
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                # the gates' order is input, forget, cell, output; the flag, which a slice loses, marks loaded weights
                if "bias_ih" in name and not getattr(parameter, "_is_hf_initialized", False):
                    parameter[module.hidden_size : 2 * module.hidden_size] = 1.0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> CausalLMOutput:
        """Logits of the next token, and the loss if there are labels.

        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, length), 1 for real tokens. Padding on either side never reaches the state.
            labels: (batch, length) int64, -100 where there is none; shifted here, as in transformers.

        Returns:
            `logits` (batch, length, vocab_size), and `loss`, nats per token.
        """
        hidden = self.embed_tokens(input_ids)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if padded:  # the state runs through padding too: real tokens go first, and return to their places afterwards
            order = torch.eq(attention_mask, 0).to(torch.int64).argsort(dim=1, stable=True)[..., None].expand_as(hidden)
            hidden = hidden.gather(1, order)
        hidden, _ = self.lstm(hidden)
        if padded:
            hidden = torch.zeros_like(hidden).scatter(1, order, hidden)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


def lstm_parameters(hidden_size: int, num_hidden_layers: int) -> int:
    """Number of non-embedding parameters: four gates, each with two square matrices and two biases, per layer."""
    return num_hidden_layers * 4 * (2 * hidden_size**2 + 2 * hidden_size)


def matching_hidden_size(num_parameters: int, num_hidden_layers: int) -> int:
    """The width whose number of non-embedding parameters is nearest to `num_parameters`.

    >>> matching_hidden_size(lstm_parameters(96, 2), 2)
    96
    """
    width = (math.sqrt(1 + num_parameters / (2 * num_hidden_layers)) - 1) / 2  # 8 L (h² + h) = N, solved for h
    candidates = (max(1, math.floor(width)), max(1, math.ceil(width)))
    return min(candidates, key=lambda h: abs(lstm_parameters(h, num_hidden_layers) - num_parameters))


AutoConfig.register("lstm", LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
