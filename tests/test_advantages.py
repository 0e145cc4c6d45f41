"""KL penalty, GAE and whitening against hand-written numbers and brute force."""

import numpy as np
import torch

from rlhf.ppo.advantages import add_scores, estimate_advantages, gae, kl_penalty, whiten
from rlhf.ppo.metrics import explained_variance
from rlhf.ppo.moments import moments
from rlhf.ppo.processes import Processes

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_kl_penalty_sums_to_the_logprob_difference():
    new = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -9.0, -9.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -1.0, -1.0]])
    reward = kl_penalty(new, reference, MASK, 0.1)
    assert torch.allclose(reward, torch.tensor([[-0.05, 0.1, 0.0], [0.1, 0.0, 0.0]]))


def test_score_lands_on_the_last_token():
    rewards = add_scores(torch.zeros(2, 3), torch.tensor([2.0, -1.0]), MASK)
    assert rewards.tolist() == [[0, 0, 2], [-1, 0, 0]]


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 5.0, 5.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 7.0, 7.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.5)
    # row 0 from the end: 2 - 1.5 = 0.5; (0 + 1.5 - 1) + 0.5·0.5 = 0.75; (1 + 1 - 0.5) + 0.5·0.75 = 1.875
    # row 1 ends after its first token: 3 - 1 = 2, whatever stands behind it
    assert torch.allclose(advantages, torch.tensor([[1.875, 0.75, 0.5], [2.0, 0.0, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[2.375, 1.75, 2.0], [3.0, 0.0, 0.0]]))


def test_gae_equals_the_sum_of_discounted_errors():
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 4]
    rewards, values = (torch.randn(3, 7, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantages, _ = gae(rewards * mask, values, mask, gamma=0.9, lam=0.8)
    for row, length in enumerate(lengths):
        for t in range(length):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1] if k + 1 < length else 0.0
                expected += (0.9 * 0.8) ** (k - t) * (rewards[row, k] + 0.9 * following - values[row, k])
            assert torch.isclose(advantages[row, t], expected, atol=1e-5)


def test_lambda_one_gives_return_minus_value():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert torch.allclose(returns, torch.ones(1, 3))
    assert torch.allclose(advantages, 1 - values)


def test_whitening_equals_numpy_and_ignores_padding():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    kept = np.array([1.0, 2.0, 4.0, 8.0])
    expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    assert np.allclose(whiten(values, MASK)[MASK].numpy(), expected)
    assert whiten(values, MASK)[~MASK].abs().sum() == 0
    assert np.allclose(whiten(values, MASK, shift_mean=False)[MASK].numpy(), expected + kept.mean(), atol=1e-6)


def test_moments_are_numpys_over_the_masked_values_of_each_row():
    values = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, False, False, False, True]])
    count, mean, variance = moments(values.masked_fill(~mask, torch.nan), mask)
    assert count.tolist() == [4, 2]
    for row, (kept, chosen) in enumerate(zip(values.double().numpy(), mask.numpy(), strict=True)):
        assert np.isclose(mean[row], kept[chosen].mean()) and np.isclose(variance[row], kept[chosen].var())


def test_explained_variance_by_hand():
    returns, values = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.5, 2.5, -7.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns, values, mask) == 0.75  # errors -0.5 and 0.5 of variance 0.25, returns of 1
    assert explained_variance(torch.ones(1, 3), values, mask) == 0.0  # returns that don't vary


def test_whitening_a_single_token_is_finite():
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 0.0]]), mask).tolist() == [[0.0, 0.0]]


def test_whitening_with_the_sums_of_two_processes_is_whitening_together():
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.bool)
    sums: list[torch.Tensor] = []

    def keep(own):
        sums.append(own)
        return own

    for row in range(2):
        whiten(values[row : row + 1], mask[:1], processes=Processes(sum=keep))
    both = Processes(sum=lambda own: sums[0] + sums[1])
    halves = [whiten(values[row : row + 1], mask[:1], processes=both) for row in range(2)]
    assert torch.allclose(torch.cat(halves), whiten(values, mask), atol=1e-6)


def test_estimate_advantages_puts_the_pieces_together():
    logprobs, reference = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = estimate_advantages(
        torch.tensor([1.0]), logprobs, reference, torch.zeros(1, 2), mask, kl_coef=0.5, gamma=1.0, lam=1.0
    )
    assert result.rewards.tolist() == [[-0.5, 1.0]]
    assert result.returns.tolist() == [[0.5, 1.0]]
    assert torch.allclose(result.advantages, torch.tensor([[-1.0, 1.0]]), atol=1e-4)
