"""Three optimizer steps of SFT, a reward model and DPO against transformers and PyTorch, on padded rows.

The first loss shows that the forward pass and the loss agree, the others that gradient and AdamW do. TRL's own
trainers, over 30 steps and for every loss, are compared by `make parity` (docs/parity.md).
"""

import numpy as np
import pytest

from easyrl.data.packing import Shape, pack
from easyrl.hf.export import export_model
from easyrl.hf.load import load_params
from easyrl.models.families import param_specs
from easyrl.steps.dpo import DPOConfig, make_dpo_step, place_answers
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.reward import RewardLossConfig, make_reward_step, place_reward_batch
from easyrl.steps.sft import make_sft_step, place_sft_batch
from easyrl.steps.state import create_train_state
from tests.tiny import draw_params, tiny_config

torch = pytest.importorskip("torch", reason="needs PyTorch, as in the extra `parity`")
transformers = pytest.importorskip("transformers")

MARGINS = np.array([0.0, 0.5, 1.0, 0.25], np.float32)
REFERENCE = np.linspace(-30.0, -20.0, 8).astype(np.float32)
SHAPES = [Shape(2, 48), Shape(2, 24)]  # of groups of packed rows
LR, DECAY = 1e-2, 0.1


def torch_answers(model, ragged):
    """(log-probs [B] of the answers, numbers of their tokens)."""
    tokens, mask = torch.tensor(ragged.tokens, dtype=torch.long) % 40, torch.tensor(ragged.mask)
    real = torch.arange(tokens.shape[1]) < torch.tensor(ragged.lengths)[:, None]
    logits = model(tokens, attention_mask=real.long()).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])[..., 0]
    return (logprobs * mask[:, :-1]).sum(1), mask.sum(1)


def torch_sft(model, ragged):
    logprobs, lengths = torch_answers(model, ragged)
    return -logprobs.sum() / lengths.sum()


def torch_dpo(model, ragged):
    logprobs, _ = torch_answers(model, ragged)
    ratios = logprobs - torch.tensor(REFERENCE)
    return -torch.nn.functional.logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()


def torch_reward(model, ragged):
    scores = torch.stack([
        model(torch.tensor(tokens[None, :length], dtype=torch.long) % 40).logits[0, -1]
        for tokens, length in zip(ragged.tokens, ragged.lengths, strict=True)
    ])  # fmt: skip
    chosen, rejected = scores[::2].reshape(-1), scores[1::2].reshape(-1)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(MARGINS))
    return (loss + 0.05 * (chosen + rejected) ** 2).mean()


def our_sft(cfg, ragged, optimizer, mesh):
    batch = place_sft_batch(ragged.tokens % 40, ragged.mask, pack(ragged.lengths, 24, SHAPES), mesh)
    return make_sft_step(cfg, optimizer, mesh), batch


def our_dpo(cfg, ragged, optimizer, mesh):
    packing = pack(ragged.lengths, 24, SHAPES, together=2)
    batch = place_answers(ragged.tokens % 40, ragged.mask, REFERENCE, packing, mesh, paired=True)
    return make_dpo_step(cfg, optimizer, mesh, DPOConfig()), batch


def our_reward(cfg, ragged, optimizer, mesh):
    packing = pack(ragged.lengths, 24, SHAPES, together=2)
    batch = place_reward_batch(ragged.tokens % 40, ragged.lengths, MARGINS, packing, mesh)
    return make_reward_step(cfg, optimizer, mesh, RewardLossConfig(center_coef=0.05)), batch


@pytest.mark.parametrize(
    ("head", "model_class", "ours", "theirs"),
    [
        ("lm", "AutoModelForCausalLM", our_sft, torch_sft),
        ("reward", "AutoModelForSequenceClassification", our_reward, torch_reward),
        ("lm", "AutoModelForCausalLM", our_dpo, torch_dpo),
    ],
    ids=["sft", "reward", "dpo"],
)
def test_three_steps_are_those_of_pytorch(tmp_path, ragged, one_device, head, model_class, ours, theirs):
    cfg = tiny_config()
    export_model(tmp_path / "model", cfg, draw_params(cfg, head, 0.2), head)
    model = getattr(transformers, model_class).from_pretrained(tmp_path / "model", dtype=torch.float32)
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["norm" in name].append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": groups[False], "weight_decay": DECAY}, {"params": groups[True], "weight_decay": 0.0}], lr=LR
    )
    expected = []
    for _ in range(3):
        loss = theirs(model, ragged)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        expected.append((loss.item(), norm.item()))

    optimizer = make_optimizer(OptimizerConfig(weight_decay=DECAY), make_schedule("constant", LR, 10))
    params = load_params(tmp_path / "model", cfg, head, one_device, np.float32)
    state = create_train_state(params, param_specs(cfg, head), optimizer, one_device)
    step, batch = ours(cfg, ragged, optimizer, one_device)
    found = []
    for _ in range(3):
        state, metrics = step(state, batch)
        found.append((float(metrics["loss"].value), float(metrics["grad_norm"].value)))

    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[2][0] < found[0][0]
