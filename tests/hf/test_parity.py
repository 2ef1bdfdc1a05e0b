"""The same numbers as transformers on torch, in float32 to 1e-4, for every family and every switch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.data.tokenizer import classifier_pad_id, encode, load_tokenizer
from easyrl.hf.export import export_model
from easyrl.hf.families import config_from_hf, read_config, read_pad_id
from easyrl.hf.load import load_params
from easyrl.models import heads
from easyrl.models.trunk import trunk
from easyrl.sampling.decode import SamplingConfig
from easyrl.steps.reward import SequenceScorer
from easyrl.steps.sampling import Sampler
from tests.tiny import draw_params

torch = pytest.importorskip("torch", reason="parity is measured against transformers on torch")
transformers = pytest.importorskip("transformers", reason="parity is measured against transformers on torch")

TOLERANCE = 1e-4
PAD = 0
LENGTHS = (40, 17, 29)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,  # of 40: positions run past it, and all three bands of frequencies occur
}
CASES = {
    "llama": {"num_key_value_heads": 4},
    "llama-gqa": {"num_key_value_heads": 2},
    "llama-mqa-odd-vocab": {"num_key_value_heads": 1, "vocab_size": 53},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 6},
    "llama-rope-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama-rope-llama3": {"rope_parameters": LLAMA3, "head_dim": 16},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 7},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3-window-bias": {
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "gpt2": {},
    "gpt2-odd-heads-untied": {"hidden_size": 15, "num_attention_heads": 5, "tie_word_embeddings": False},
    "gpt2-switches": {"activation_function": "gelu", "n_inner": 20, "reorder_and_upcast_attn": True},
    "bloom": {},
    "bloom-3-heads": {"hidden_size": 12, "num_attention_heads": 3},
    "bloom-5-heads-untied": {"hidden_size": 20, "num_attention_heads": 5, "tie_word_embeddings": False},
    "bloom-6-heads-post-norm": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "apply_residual_connection_post_layernorm": True,
    },
}


def random_models(tiny, case):
    """transformers' three models on one random trunk, every parameter drawn (biases and norms start out trivial)."""
    settings = tiny(model_type=case.split("-")[0], pad_token_id=PAD, num_labels=1, **CASES[case])
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    classes = {
        "lm": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
        "value": transformers.AutoModelForTokenClassification,
    }
    models = {head: auto.from_config(config, attn_implementation="eager").eval() for head, auto in classes.items()}
    with torch.no_grad():
        for model in models.values():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if re.search(r"(norm|ln_\w)\.weight", name) else 0.0, 0.2)
    for head in ("reward", "value"):
        models[head].base_model.load_state_dict(models["lm"].base_model.state_dict())
    return models


def padded_tokens(vocab_size):
    """Rows of `LENGTHS` tokens padded on the right, none of them the padding token, and the mask of real ones."""
    tokens = np.random.default_rng(0).integers(1, vocab_size, (len(LENGTHS), max(LENGTHS)))
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(real, tokens, PAD), real


def hidden_states(cfg, params, tokens, real):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda params, *inputs: trunk(params, cfg, *inputs)[0])
    return run(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(real, jnp.int32))


def torch_logits(model, tokens, real):
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(real, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_scores_and_values(case, tiny, tmp_path, mesh):
    models = random_models(tiny, case)
    tokens, real = padded_tokens(models["lm"].config.vocab_size)
    cfg, params = load_all(models, tmp_path, mesh)
    hidden = hidden_states(cfg, params["lm"], tokens, real)
    expected = {head: torch_logits(model, tokens, real) for head, model in models.items()}

    logits = heads.lm_logits(params["lm"], cfg, hidden)
    assert np.abs(expected["lm"][real]).max() > 1  # else agreement would mean little
    np.testing.assert_allclose(logits[real], expected["lm"][real], atol=TOLERANCE, rtol=0)

    rewards = heads.scalar(params["reward"], cfg, hidden)
    last = np.array(LENGTHS) - 1
    np.testing.assert_allclose(rewards[np.arange(3), last], expected["reward"][:, 0], atol=TOLERANCE, rtol=0)

    values = heads.scalar(params["value"], cfg, hidden)
    np.testing.assert_allclose(values[real], expected["value"][real][:, 0], atol=TOLERANCE, rtol=0)
    for head in ("reward", "value"):
        jax.tree.map(np.testing.assert_array_equal, params[head]["layers"], params["lm"]["layers"])


def load_all(models, tmp_path, mesh):
    """The configuration, and the parameters of every head, as saved by transformers and read by us."""
    params = {}
    for head, model in models.items():
        model.save_pretrained(tmp_path / head)
        cfg = read_config(tmp_path / head)
        params[head] = load_params(tmp_path / head, cfg, head, mesh, "float32")
    return cfg, params


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "gpt2-odd-heads-untied", "bloom", "bloom-5-heads-untied"])
def test_packed_rows_and_greedy_decoding(case, tiny, tmp_path, mesh):
    """Rows of unequal length side by side give transformers' logits of each alone; decoding continues as it does."""
    models = random_models(tiny, case)
    cfg, params = load_all({"lm": models["lm"]}, tmp_path, mesh)
    model, lengths, new = models["lm"], (9, 4, 6), 8
    rows = [np.random.default_rng(n).integers(1, cfg.vocab_size, length) for n, length in enumerate(lengths)]

    packed = np.concatenate(rows)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    hidden = trunk(params["lm"], cfg, *(jnp.asarray(x, jnp.int32) for x in (packed, positions, segments)))[0]
    alone = [torch_logits(model, row[None], np.ones((1, len(row)), bool))[0] for row in rows]
    logits = heads.lm_logits(params["lm"], cfg, hidden)[0]
    np.testing.assert_allclose(logits, np.concatenate(alone), atol=TOLERANCE, rtol=0)

    prompts = np.stack([np.pad(row, (0, max(lengths) - len(row))) for row in rows]).astype(np.int32)
    sample = Sampler(cfg, SamplingConfig(max_new_tokens=new, temperature=0.0), stop_ids=())
    samples = sample(params["lm"], prompts, np.array(lengths), jax.random.key(0), np.arange(3))
    for row, ours in zip(rows, np.asarray(samples.tokens_BC), strict=True):
        given = torch.tensor(row)[None]
        theirs = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
                                eos_token_id=None)  # fmt: skip
        assert ours.tolist() == theirs[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.parametrize("ends", [True, False])
def test_scores_of_padded_texts_under_real_tokenizers(name, ends, tiny, tmp_path, mesh, shared_data):
    """Neither has a pad token: what config.json then names must have transformers read scores where we do."""
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    cfg = config_from_hf(tiny(model_type="gpt2" if name == "gpt2" else "llama", vocab_size=len(tokenizer)), "tiny")
    params, pad = draw_params(cfg, "reward"), classifier_pad_id(tokenizer)
    export_model(tmp_path / "m", cfg, params, "reward", tokenizer=tokenizer, config_fields={"pad_token_id": pad})
    texts = ["A short one.", "One that is somewhat longer, as it happens.", "Ohne Ende: ünïcödé 中文"]
    rows = [encode(tokenizer, text) + ([tokenizer.eos_token_id] if ends else []) for text in texts]
    scorer = SequenceScorer(
        params, cfg, mesh, max_length=64, num_sequences=3, rows=1, pad_id=read_pad_id(tmp_path / "m")
    )
    ours = scorer([np.array(row, np.int32) for row in rows])

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    longest = max(map(len, rows))
    padded = np.array([row + [pad] * (longest - len(row)) for row in rows])
    real = np.arange(longest) < np.array([[len(row)] for row in rows])
    np.testing.assert_allclose(ours, torch_logits(model, padded, real)[:, 0], atol=TOLERANCE, rtol=0)
    assert np.ptp(ours) > 0.1  # else agreement would mean little


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105", "babyllama-tok361"])
def test_pretrained_models(name, shared_data, mesh):
    directory = shared_data / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    cfg = read_config(directory)
    params = load_params(directory, cfg, "lm", mesh, "float32")
    tokens, real = padded_tokens(cfg.vocab_size)
    tokens[:, 0] = 1
    logits = heads.lm_logits(params, cfg, hidden_states(cfg, params, tokens, real))
    np.testing.assert_allclose(logits[real], torch_logits(model, tokens, real)[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "family",
    [
        "llama-biases", "mistral-window", "qwen2-window", "qwen3-window-bias", "gpt2-odd-heads-untied", "gpt2-switches",
        "bloom-6-heads-post-norm",
    ],
)  # fmt: skip
def test_exports_load_in_transformers(family, tiny, make, tmp_path):
    """With no missing and no unexpected key, and with the same numbers."""
    changes = {"model_type": family.split("-")[0], **CASES[family]}
    tokens, real = np.random.default_rng(0).integers(1, 48, (1, 12)), np.ones((1, 12), bool)
    for head, auto in (
        ("lm", transformers.AutoModelForCausalLM),
        ("reward", transformers.AutoModelForSequenceClassification),
        ("value", transformers.AutoModelForTokenClassification),
    ):
        cfg, params = make(head, **changes)
        params = jax.tree.map(lambda x: x * 0.3, params)
        folder = export_model(tmp_path / head, cfg, params, head, max_shard_bytes=8000)
        model, info = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        assert not any(info.values()), info
        hidden = hidden_states(cfg, params, tokens, real)
        found = torch_logits(model.eval(), tokens, real)
        if head == "lm":
            np.testing.assert_allclose(heads.lm_logits(params, cfg, hidden), found, atol=TOLERANCE, rtol=0)
        else:
            ours = heads.scalar(params, cfg, hidden)[0]
            np.testing.assert_allclose(ours[-1:] if head == "reward" else ours, found.ravel(), atol=TOLERANCE, rtol=0)
