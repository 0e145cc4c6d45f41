"""How strongly the KL penalty pulls."""


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next KL coefficient: k · (1 + clip(KL / target - 1, ±0.2) · episodes / horizon).

    Ziegler et al., section 2.2 (https://arxiv.org/abs/1909.08593), and
    https://github.com/openai/lm-human-preferences/blob/cbfd210bb8b08f6bc5c26878c10984b90f516c66/lm_human_preferences/train_policy.py#L115

    Args:
        kl: of the last batch, per completion, in nats.
        episodes: completions in that batch.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)
