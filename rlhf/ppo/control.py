"""The coefficient of the KL penalty, adapted during a run."""


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next KL coefficient: k · (1 + clip(KL / target - 1, ±0.2) · episodes / horizon).

    Ziegler et al., section 2.2 (https://arxiv.org/abs/1909.08593), and
    https://github.com/openai/lm-human-preferences/blob/cbfd210bb8b08f6bc5c26878c10984b90f516c66/lm_human_preferences/train_policy.py#L115

    Far from the target it changes by a fifth per `horizon` episodes:

    >>> adapted_kl_coef(0.05, kl=20.0, target=6.0, episodes=1000, horizon=1000)
    0.06

    Args:
        kl: mean KL of a completion in the last batch, in nats.
        episodes: completions in that batch.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)
