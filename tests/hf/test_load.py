import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyrl.core.errors import UserError
from easyrl.core.params import shardings
from easyrl.core.sharding import make_mesh
from easyrl.hf.families import read_config
from easyrl.hf.layout import named_leaves
from easyrl.hf.load import load_params
from easyrl.hf.safetensors_io import INDEX, WEIGHTS, Checkpoint
from easyrl.models.families import param_specs

Q = "model.layers.{}.self_attn.q_proj.weight"
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


def load(directory, mesh, head="lm", dtype="float32", **kwargs):
    return load_params(directory, read_config(directory), head, mesh, dtype, **kwargs)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit(directory, **changes):
    """Rewrite a folder's weights: a tensor's new value, or None to drop it. `__` in a keyword stands for a dot."""
    tensors = load_file(directory / WEIGHTS)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / WEIGHTS)


class TestSharded:
    @pytest.mark.parametrize("mesh_dim", ["2,2,2", "1,8,1", "8,1,1"])
    def test_every_mesh_gets_the_same_values(self, folder, make, mesh_dim):
        cfg, params = make(attention_bias=True)
        mesh = make_mesh(mesh_dim)
        loaded = load(folder(attention_bias=True), mesh)
        assert_same(loaded, params)
        assert jax.tree.map(lambda x: x.sharding, loaded) == shardings(param_specs(cfg, "lm"), mesh)

    def test_only_what_a_device_needs_is_read_and_only_once(self, folder, monkeypatch):
        directory = folder()
        reads = []
        read = Checkpoint.read

        def counting_read(self, name, slices):
            array = read(self, name, slices)
            reads.append((name, array.nbytes))
            return array

        monkeypatch.setattr(Checkpoint, "read", counting_read)
        load(directory, make_mesh("2,2,2"))
        tensors = load_file(directory / WEIGHTS)
        # fsdp x mp = 4 distinct parts of a weight; the two replicas of each share one read.
        of_q = [size for name, size in reads if name == Q.format(1)]
        assert of_q == [tensors[Q.format(1)].nbytes // 4] * 4
        assert sum(size for _, size in reads) == sum(tensor.nbytes for tensor in tensors.values())

    @pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
    def test_threads_leave_no_number_out(self, folder, monkeypatch, mesh_dim, wanted):
        directory, mesh = folder(), make_mesh(mesh_dim, devices=jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])
        whole = load(directory, mesh, dtype=wanted)
        monkeypatch.setattr("easyrl.hf.load.SMALL", 0)
        for threads in (3, 64):  # neither the rows nor the layers divide by it; there are fewer rows than threads
            monkeypatch.setattr("easyrl.hf.load.THREADS", threads)
            monkeypatch.setattr("easyrl.hf.load.TILE", (5, 7))
            assert_same(load(directory, mesh, dtype=wanted), whole)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere parameters never stay in the host's memory")
    def test_what_will_be_trained_is_changed_in_place(self, folder, mesh):
        double = jax.jit(lambda x: x * 2, donate_argnums=0)
        pointer = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(load(folder(hidden_size=256, vocab_size=1024), mesh, trained=True)):
            before = pointer(leaf)
            assert pointer(double(leaf)) == before

    def test_a_sharding_that_does_not_fit_names_the_parameter(self, folder):
        with pytest.raises(UserError, match=r"parameter layers/attn/k .*kv_heads=2"):
            load(folder(), make_mesh("1,1,8"))


class TestFiles:
    def test_three_files(self, folder, make, mesh):
        directory = folder(max_shard_bytes=8000)
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert_same(load(directory, mesh), make()[1])

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
    def test_cast_on_the_way_in(self, folder, mesh, stored, wanted):
        directory = folder()
        cast = {name: x.astype(np.dtype(stored)) for name, x in load_file(directory / WEIGHTS).items()}
        save_file(cast, directory / WEIGHTS)
        loaded = load(directory, mesh, dtype=wanted)
        assert loaded["final_norm"].dtype == wanted
        expected = cast["lm_head.weight"].T.astype(np.dtype(wanted))
        np.testing.assert_array_equal(loaded["head"]["kernel"], expected)

    def test_harmless_extras(self, folder, make, mesh):
        directory = folder(tie_word_embeddings=True)
        edit(directory, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32),
             lm_head__weight=load_file(directory / WEIGHTS)["model.embed_tokens.weight"])  # fmt: skip
        assert_same(load(directory, mesh), make(tie_word_embeddings=True)[1])

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_of_tied_tensors_either_will_do(self, folder, make, mesh, family):
        """`safetensors.torch.save_model` keeps that of two names which the alphabet has first."""
        settings = GPT2 if family == "gpt2" else {"tie_word_embeddings": True}
        embed = f"{'transformer.wte' if family == 'gpt2' else 'model.embed_tokens'}.weight"
        directory = folder(**settings)
        edit(directory, **{embed: None, "lm_head.weight": load_file(directory / WEIGHTS)[embed]})
        assert_same(load(directory, mesh), make(**settings)[1])
        assert_same(load(directory, mesh, "reward", new_head="zeros")["embed"], make(**settings)[1]["embed"])

    def test_tied_tensors_that_differ(self, folder, make, mesh):
        """transformers does not tie them."""
        directory = folder(tie_word_embeddings=True)
        head = load_file(directory / WEIGHTS)["model.embed_tokens.weight"]
        head[47, 15] += 0.5
        edit(directory, lm_head__weight=head)
        with pytest.raises(
            UserError, match=r"safetensors: tensor lm_head\.weight differs from model\.embed_tokens\.weigh"
        ):
            load(directory, mesh)
        assert_same(load(directory, mesh, "reward", new_head="zeros")["layers"], make()[1]["layers"])
        edit(directory, lm_head__weight=head[:40])
        with pytest.raises(UserError, match=r"lm_head\.weight has shape \[40, 16\], expected \[48, 16\]"):
            load(directory, mesh)

    def test_names_of_a_bare_trunk(self, folder, make, mesh):
        directory = folder(tie_word_embeddings=True)
        tensors = {name.removeprefix("model."): x for name, x in load_file(directory / WEIGHTS).items()}
        save_file(tensors, directory / WEIGHTS)
        assert_same(load(directory, mesh), make(tie_word_embeddings=True)[1])


class TestHeads:
    def test_value_model_from_a_reward_model(self, folder, make, mesh):
        _, reward = make("reward")
        value = load(folder("reward"), mesh, "value")
        assert value["head"].pop("scalar_bias") == 0
        assert_same(value, reward)

    def test_reward_model_from_a_token_classifier(self, folder, make, mesh):
        directory = folder("value")
        edit(directory, score__bias=np.array([0], np.float32))
        assert_same(load(directory, mesh, "reward"), make("reward")[1])
        edit(directory, score__bias=np.array([0.25], np.float32))
        with pytest.raises(UserError, match=r"score\.bias is 0\.25, expected 0"):
            load(directory, mesh, "reward")

    def test_new_head_on_a_language_model(self, folder, make, mesh):
        directory, (_, lm) = folder(), make()
        zeros = load(directory, mesh, "reward", new_head="zeros")
        assert not zeros["head"]["scalar"].any()
        assert_same(zeros["layers"], lm["layers"])
        drawn = [load(directory, m, "value", new_head="normal", seed=3)["head"] for m in (mesh, make_mesh("1,8,1"))]
        assert_same(*drawn)
        assert 0.1 < float(np.std(drawn[0]["scalar"])) < 0.5  # 1 / sqrt(17) is 0.24
        assert drawn[0]["scalar_bias"] == 0

    def test_new_head_leaves_a_trained_one_alone(self, folder, make, mesh):
        assert_same(load(folder("reward"), mesh, "reward", new_head="zeros"), make("reward")[1])


def _config(**changes):
    def apply(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def _truncate(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def _shards(**changes):
    """Turn the folder into one with an index; `changes` adds to the index's weight map."""

    def apply(directory):
        names = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).rename(directory / "model-1.safetensors")
        weight_map = dict.fromkeys(names, "model-1.safetensors") | changes
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return apply


WRONG = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list, expected a JSON object"),
    "other family": (_config(model_type="mamba"), "model_type is 'mamba', expected one of"),
    "dynamic rope": (_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic', expected default or linear"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "found no weights, expected model.safetensors"),
    "pickles only": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "found only pytorch_model.bin"),
    "truncated": (_truncate, "model.safetensors: cut short or not a safetensors file"),
    "not safetensors": (lambda d: (d / WEIGHTS).write_text("hello"), "cut short or not a safetensors file"),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), "cut short or not a safetensors file"),
    "shard missing": (
        _shards(**{"lm_head.weight": "model-2.safetensors"}),
        "model-2.safetensors: no such file, though",
    ),
    "shard lacks a tensor": (
        _shards(extra="model-1.safetensors"),
        "tensor extra is missing, though model.safetensors.in",
    ),
    "empty index": (lambda d: ((d / WEIGHTS).unlink(), (d / INDEX).write_text("{}")), "weight_map is missing"),
    "vocabulary": (
        _config(vocab_size=50),
        "model.embed_tokens.weight has shape [48, 16], expected [50, 16] from config",
    ),
    "width of the mlp": (_config(intermediate_size=32), "gate_proj.weight has shape [24, 16], expected [32, 16]"),
    "kv heads": (_config(num_key_value_heads=4), "k_proj.weight has shape [8, 16], expected [16, 16]"),
    "too few layers": (_config(num_hidden_layers=3), "tensor model.layers.2.input_layernorm.weight is missing"),
    "too many layers": (
        _config(num_hidden_layers=1),
        "tensor model.layers.1.input_layernorm.weight (and 8 more) is left",
    ),
    "no bias": (_config(attention_bias=True), "q_proj.bias is missing, expected shape [16]"),
    "tensor missing": (
        lambda d: edit(d, model__norm__weight=None),
        "tensor model.norm.weight is missing, expected shape [16]",
    ),
    "integer weights": (
        lambda d: edit(d, lm_head__weight=np.zeros((48, 16), np.int8)),
        "tensor lm_head.weight has type I8, expected one of F64, F32, F16, BF16",
    ),
}


class TestErrors:
    @pytest.mark.parametrize("case", WRONG)
    def test_one_line_names_the_file(self, case, folder, mesh):
        spoil, message = WRONG[case]
        directory = folder()
        spoil(directory)
        with pytest.raises(UserError) as error:
            load(directory, mesh)
        assert message in str(error.value)
        assert str(error.value).startswith(str(directory))
        assert "\n" not in str(error.value)

    def test_language_model_where_a_reward_model_is_expected(self, folder, mesh):
        with pytest.raises(UserError, match=r"score\.weight is missing, expected a reward model's head"):
            load(folder(), mesh, "reward")

    def test_reward_model_where_a_language_model_is_expected(self, folder, mesh):
        with pytest.raises(UserError, match=r"holds a classifier .*, expected a language model"):
            load(folder("reward", tie_word_embeddings=True), mesh)

    def test_classifier_of_two_labels(self, folder, mesh):
        directory = folder("reward")
        edit(directory, score__weight=np.zeros((2, 16), np.float32))
        with pytest.raises(UserError, match=r"score\.weight has shape \[2, 16\], expected \[1, 16\]"):
            load(directory, mesh, "reward")


def test_leaf_names_are_paths(make):
    assert {"embed/tokens", "layers/attn/q", "final_norm", "head/kernel"} <= named_leaves(make()[1]).keys()
