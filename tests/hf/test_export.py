import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh, put, sharding_for
from easyrl.hf.export import export_model, generation_settings
from easyrl.hf.families import read_config, read_stop_ids
from easyrl.hf.layout import named_leaves
from easyrl.hf.load import load_params
from easyrl.hf.model_card import ModelCard
from easyrl.hf.safetensors_io import INDEX, WEIGHTS, TensorInfo, plan_shards
from easyrl.models.families import param_specs
from easyrl.sampling.decode import SamplingConfig

HEADS = ("lm", "reward", "value")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}<|assistant|>\n"


@pytest.fixture
def tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


class TestWeights:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_export_then_import_is_bitwise(self, make, mesh, tmp_path, head, dtype):
        cfg, params = make(head, dtype, model_type="qwen3", head_dim=8, attention_bias=True)
        folder = export_model(tmp_path / "model", cfg, params, head, max_shard_bytes=6000)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert read_config(folder) == cfg
        loaded = load_params(folder, cfg, head, mesh, dtype)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(dtype)}

    def test_a_full_disk_keeps_the_export_before(self, make, mesh, small_disk):
        cfg, params = make()
        folder = export_model(small_disk / "model", cfg, params)
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        with pytest.raises(OSError, match="No space left"):
            export_model(folder, cfg, jax.tree.map(jax.numpy.zeros_like, params))
        jax.tree.map(np.testing.assert_array_equal, load_params(folder, cfg, "lm", mesh, "float32"), params)
        assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "model"]

    def test_sharded_parameters_give_the_same_file(self, make, tmp_path):
        cfg, params = make()
        mesh, specs = make_mesh("2,2,2"), named_leaves(param_specs(cfg, "lm"))
        sharded = jax.tree_util.tree_map_with_path(
            lambda path, x: put(x, sharding_for(specs[(n := "/".join(k.key for k in path))].axes, x.shape, mesh, n)),
            params,
        )
        one, many = export_model(tmp_path / "one", cfg, params), export_model(tmp_path / "many", cfg, sharded)
        assert (one / WEIGHTS).read_bytes() == (many / WEIGHTS).read_bytes()

    def test_cast_on_the_way_out(self, make, tmp_path):
        cfg, params = make()
        folder = export_model(tmp_path / "model", cfg, params, dtype="bfloat16")
        assert {x.dtype.name for x in load_file(folder / WEIGHTS).values()} == {"bfloat16"}
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_one_file_is_marked_as_torch_weights(self, folder):
        with safe_open(folder() / WEIGHTS, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}

    def test_tied_embeddings_are_written_once(self, folder):
        assert "lm_head.weight" not in load_file(folder(tie_word_embeddings=True) / WEIGHTS)

    def test_index_is_the_hubs(self, folder):
        directory = folder(max_shard_bytes=8000)
        index = json.loads((directory / INDEX).read_text())
        found = {}
        for path in directory.glob("*.safetensors"):
            found |= dict.fromkeys(load_file(path), path.name)
            assert sum(x.nbytes for x in load_file(path).values()) <= 8000
        assert index["weight_map"] == found
        assert index["metadata"]["total_size"] == sum(
            x.nbytes for path in directory.glob("*.safetensors") for x in load_file(path).values()
        )

    def test_plan_keeps_order_and_size(self):
        infos = [TensorInfo(str(i), (size,), np.dtype("int8")) for i, size in enumerate([4, 4, 9, 1, 7, 1, 1])]
        shards = [[info.name for info in shard] for shard in plan_shards(infos, 8)]
        assert shards == [["0", "1"], ["2"], ["3", "4"], ["5", "6"]]

    def test_parameters_of_another_head_are_refused(self, make, tmp_path):
        cfg, params = make("reward")
        with pytest.raises(ValueError, match="structure of a llama with the head lm"):
            export_model(tmp_path / "model", cfg, params, "lm")


class TestTexts:
    def test_config_names_the_class(self, folder):
        for model_type, prefix in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")):
            for head, suffix in zip(HEADS, ("CausalLM", "SequenceClassification", "TokenClassification"), strict=True):
                config = AutoConfig.from_pretrained(folder(head, model_type=model_type))
                assert config.architectures == [f"{prefix}For{suffix}"]
                assert head == "lm" or config.num_labels == 1

    def test_tokenizer_and_special_ids(self, make, tmp_path, tokenizer):
        cfg, params = make()
        generation = {"temperature": 0.7, "eos_token_id": [2, 4], "max_new_tokens": 9}
        folder = export_model(tmp_path / "model", cfg, params, tokenizer=tokenizer, generation_config=generation)
        again = AutoTokenizer.from_pretrained(folder)
        assert again.chat_template == TEMPLATE
        assert again("a b").input_ids == [3, 4]
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 4])
        assert "pad_token_id" not in config
        assert read_stop_ids(folder, cfg.vocab_size) == (2, 4)

    def test_tokenizer_settings_have_names_that_transformers_4_knows(self, make, tmp_path, tokenizer):
        """There is no TokenizersBackend in it, and its extra_special_tokens are no list."""
        tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
        folder = export_model(tmp_path / "model", *make(), tokenizer=tokenizer)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == ["<x>"] and "extra_special_tokens" not in settings
        again = AutoTokenizer.from_pretrained(folder)
        assert again.all_special_tokens == tokenizer.all_special_tokens and "<x>" in again.all_special_tokens

    def test_generation_config_hides_nothing(self, make, tmp_path, tokenizer):
        """transformers keeps the 50 likeliest tokens unless told otherwise."""
        cfg, params = make()
        settings = generation_settings(None, (2, 4), tokenizer)
        folder = export_model(tmp_path / "model", cfg, params, generation_config=settings)
        config = GenerationConfig.from_pretrained(folder)
        assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 1.0)
        assert config.eos_token_id == [2, 4]
        assert generation_settings(SamplingConfig(9, temperature=0.0, top_p=0.5), (2,), tokenizer) == {
            "do_sample": False, "max_new_tokens": 9, "min_new_tokens": 0, "repetition_penalty": 1.0,
            "eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 2,
        }  # fmt: skip

    def test_model_card(self, make, tmp_path):
        cfg, params = make()
        card = ModelCard(title="Tiny", hyperparameters={"learning_rate": 1e-6})
        folder = export_model(tmp_path / "model", cfg, params, model_card=card)
        assert "- learning_rate: 1e-06" in (folder / "README.md").read_text()


class TestFolder:
    def test_a_failed_export_leaves_the_earlier_one(self, make, tmp_path, tokenizer, monkeypatch):
        cfg, params = make()
        folder = export_model(tmp_path / "model", cfg, params)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            export_model(folder, cfg, jax.tree.map(lambda x: x + 1, params), tokenizer=tokenizer)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_an_earlier_export_is_replaced_whole(self, make, tmp_path):
        cfg, params = make()
        folder = export_model(tmp_path / "model", cfg, params, max_shard_bytes=8000)
        export_model(folder, cfg, params)
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "config.json", WEIGHTS,
        ]  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_what_is_not_ours_is_not_touched(self, make, tmp_path):
        cfg, params = make()
        (tmp_path / "thesis.tex").write_text("chapter 1")
        with pytest.raises(UserError, match=r"^--output_dir: .* holds files that are not an earlier export"):
            export_model(tmp_path, cfg, params)
        with pytest.raises(UserError, match="is a file"):
            export_model(tmp_path / "thesis.tex", cfg, params)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match="not an earlier export"):
            export_model(tmp_path / "other", cfg, params)
        assert (tmp_path / "thesis.tex").read_text() == "chapter 1"
