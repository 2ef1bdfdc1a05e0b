"""Greedy decoding gives the tokens of transformers' `generate`, with mixed prompt lengths and several stop ids."""

import jax
import numpy as np
import pytest

from easyrl.core.sharding import make_mesh
from easyrl.hf.families import read_config
from easyrl.hf.load import load_params
from easyrl.sampling.decode import SamplingConfig
from easyrl.steps.sampling import Sampler

torch = pytest.importorskip("torch", reason="greedy decoding is measured against transformers on torch")
transformers = pytest.importorskip("transformers", reason="greedy decoding is measured against transformers on torch")

PAD = 0


def ours(directory, prompts, lengths, stop_ids, **settings):
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    cfg = read_config(directory)
    params = load_params(directory, cfg, "lm", mesh, "float32")
    sample = Sampler(cfg, SamplingConfig(temperature=0.0, **settings), stop_ids=stop_ids, pad_id=PAD)
    return sample(params, prompts, lengths, jax.random.key(0), np.arange(len(prompts)))


def theirs(model, prompts, lengths, stop_ids, **settings):
    """Responses [B, C], from prompts moved to the right, since `generate` wants its padding on the left."""
    width = prompts.shape[1]
    shifted = np.stack([np.roll(row, width - n) for row, n in zip(prompts, lengths, strict=True)])
    real = np.arange(width) >= width - lengths[:, None]
    out = model.generate(
        torch.tensor(np.where(real, shifted, PAD), dtype=torch.long),
        attention_mask=torch.tensor(real, dtype=torch.long),
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=PAD,
        **settings,
    )
    return out[:, width:].numpy()


def check(model, directory, prompts, lengths, stop_ids, **settings):
    out = ours(directory, prompts, lengths, stop_ids, **settings)
    expected = theirs(model, prompts, lengths, stop_ids, **settings)
    np.testing.assert_array_equal(out.tokens_BC[:, : expected.shape[1]], expected)
    assert int(out.lengths_B.max()) == int(out.steps) == expected.shape[1]
    return out


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    """A small Llama with weights large enough that its greedy responses wander; the folder and the torch model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return model, directory


def test_a_random_llama_with_two_stop_ids(random_llama):
    model, directory = random_llama
    lengths = np.array([4, 11, 1, 7])
    prompts = np.random.default_rng(0).integers(1, 48, (4, 11))
    out = check(model, directory, prompts, lengths, (8, 31), max_new_tokens=64)
    assert out.ended_B.any() and len(np.unique(out.tokens_BC)) > 10  # else agreement would mean little


def test_penalty_and_least_length(random_llama):
    model, directory = random_llama
    prompts = np.random.default_rng(1).integers(1, 48, (1, 9))
    settings = {"max_new_tokens": 32, "min_new_tokens": 20, "repetition_penalty": 1.4}
    check(model, directory, prompts, np.array([9]), (8, 31, 2), **settings)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105", "babyllama-tok361"])
def test_pretrained_models(name, shared_data):
    directory = shared_data / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    lengths = np.array([3, 12, 1, 8])
    prompts = np.random.default_rng(2).integers(3, model.config.vocab_size, (4, 12))
    prompts[:, 0] = model.config.bos_token_id
    check(model, directory, prompts, lengths, (1, 2), max_new_tokens=64)
