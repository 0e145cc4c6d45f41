"""The PPO loss and the minibatch loop."""

import torch

from rlhf.models.logprobs import token_logprobs
from rlhf.ppo import PPOConfig
from rlhf.ppo.model import TokenOutputs
from rlhf.ppo.types import Advantages, Rollout, Scored, pack
from rlhf.ppo.update import UpdateSettings, minibatches, ppo_loss, update

SETTINGS = UpdateSettings(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)


def test_loss_by_hand():
    ratio = torch.tensor([[1.5, 0.5, 1.0]])
    new = TokenOutputs(ratio.log(), torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 0.1, 0.0]]))
    mask = torch.tensor([[True, True, False]])
    sums = ppo_loss(
        new,
        torch.zeros(1, 3),
        torch.zeros(1, 3),
        torch.tensor([[1.0, -2.0, 5.0]]),
        torch.tensor([[2.0, 0.0, 5.0]]),
        mask,
        SETTINGS,
    )
    # policy: max(-1.5, -1.2) = -1.2 (clipped); max(2·0.5, 2·0.8) = 1.6 (clipped)
    assert torch.isclose(sums.policy_loss, torch.tensor(0.4))
    assert sums.clipped == 2
    # value: (1 - 2)² = 1 but clipped to 0.2: (0.2 - 2)² = 3.24; (0.1 - 0)² = 0.01 unclipped
    assert torch.isclose(sums.value_loss, torch.tensor(0.5 * 3.25))
    assert sums.value_clipped == 1
    assert torch.isclose(sums.loss, torch.tensor(0.4 + 0.1 * 0.5 * 3.25))
    assert sums.entropy == 3
    assert sums.ratio == 2
    assert sums.tokens == 2
    assert sums.means().entropy == 1.5
    assert (sums + sums).entropy == 6 and (sums + sums).means().entropy == 1.5


def test_epsilon_high_moves_the_upper_end_alone():
    ratio, ones = torch.tensor([[1.5, 1.25, 0.5]]), torch.ones(1, 3)
    settings = SETTINGS._replace(epsilon_high=0.3)
    sums = ppo_loss(
        TokenOutputs(ratio.log(), ones, ones),
        0 * ones,
        ones,
        torch.tensor([[1.0, 2.0, -3.0]]),
        ones,
        ones.bool(),
        settings,
    )
    # max(-1.5, -1.3), max(-2.5, -2.5) within the range, max(3·0.5, 3·0.8): -1.3 - 2.5 + 2.4
    assert torch.isclose(sums.policy_loss, torch.tensor(-1.4))
    assert sums.clipped == 2
    config = PPOConfig("out", bf16=False, use_cpu=True, cliprange=0.1, epsilon_high=0.3)
    assert UpdateSettings.of(config, warming_up=False)[:4] == (0.1, 0.2, 0.1, 0.3)


def test_logprobs_are_those_of_the_scaled_logits_in_float32():
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), temperature=0.5)
    expected = torch.log_softmax(torch.tensor([4.0, 0.0, -2.0]), -1)
    assert logprobs.dtype == torch.float32
    assert torch.isclose(logprobs[0], expected[1])
    assert torch.isclose(entropy[0], -(expected.exp() * expected).sum())


def test_minibatches_are_fresh_permutations():
    batches = list(minibatches(torch.arange(8) % 3, 3, 2, 2, torch.Generator().manual_seed(0)))
    assert len(batches) == 6  # epochs × minibatches optimizer steps
    epochs = [torch.cat([torch.cat(b) for b in batches[2 * e : 2 * e + 2]]) for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for micro_batches in batches:  # similar lengths together
        lengths = (torch.cat(micro_batches) % 3).tolist()
        assert lengths == sorted(lengths)


def _toy(rows=4, length=6):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1, 1, 2, length])
    mask = torch.arange(length) < lengths[:, None]
    randn = lambda: torch.randn(rows, length, generator=generator) * mask  # noqa: E731
    rollout = Rollout(
        ["p"] * rows, ["c"] * rows, {}, torch.arange(rows)[:, None].repeat(1, 2 + length),
        torch.cat([torch.ones(rows, 2, dtype=torch.long), mask.long()], 1), mask, torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip
    scored = Scored(torch.zeros(rows), torch.zeros(rows), randn(), randn(), randn())
    return rollout, scored, Advantages(randn(), randn(), randn(), randn())


def _gradient(micro_batch_size):
    """Gradient of one minibatch of a linear toy policy, and the statistics, with some microbatch size."""
    rollout, scored, advantages = _toy()
    weight = torch.zeros(4, 6, requires_grad=True)
    gradients = []

    def forward(packed, temperature, **_):
        rows, length = packed.input_ids[:, 0], int(packed.lengths.max())
        return TokenOutputs(scored.logprobs[rows, :length] + weight[rows, :length], torch.ones(len(rows), length),
                            weight[rows, :length])  # fmt: skip

    def step():
        gradients.append(weight.grad.clone())
        weight.grad = None
        return 1.0

    stats = update(
        forward, step, rollout, scored, advantages,
        minibatches(rollout.attention_mask.sum(1), 1, 1, micro_batch_size, torch.Generator().manual_seed(0)),
        SETTINGS,
    )  # fmt: skip
    assert len(gradients) == 1
    return gradients[0], stats


def test_four_microbatches_give_the_gradient_of_one():
    whole, whole_stats = _gradient(4)
    parts, parts_stats = _gradient(1)
    assert whole.abs().sum() > 0
    assert torch.allclose(whole, parts, atol=1e-7)
    assert abs(whole_stats.policy_loss - parts_stats.policy_loss) < 1e-6
    assert whole_stats.first_ratio == 1.0


def test_pack_joins_prompts_and_completions_and_pads_on_the_right():
    rollout, _, _ = _toy()
    padded = rollout._replace(
        input_ids=torch.nn.functional.pad(rollout.input_ids, (3, 0), value=77),
        attention_mask=torch.nn.functional.pad(rollout.attention_mask, (3, 0)),
    )
    packed = pack(padded, torch.tensor([0, 2]))
    assert packed.lengths.tolist() == [1, 2]
    assert packed.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert packed.input_ids.tolist() == [[0, 0, 0, 0], [2, 2, 2, 2]]  # row 0 holds zeros, row 2 twos
