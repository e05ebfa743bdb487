"""LLaDA checkpoints against a forward pass written out in NumPy, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ppl
from ppl.inference import SMC
from ppl.models.language import Decoder, DecoderConfig, LanguageModel
from ppl.models.masked import MaskedDiffusion
from ppl.models.masked.checkpoints import DecoderDenoiser
from tests.ppl.checks import compilations

MASK, END = 127, 2
CONFIG = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4,
    "n_kv_heads": 2, "mlp_hidden_size": 48, "mlp_ratio": 4, "max_sequence_length": 64, "vocab_size": 126,
    "embedding_size": 128, "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "activation_type": "silu",
    "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "attention_layer_norm": False, "alibi": False, "include_bias": False, "include_qkv_bias": False,
    "weight_tying": False, "scale_logits": False, "input_emb_norm": False, "bias_for_layer_norm": False,
    "multi_query_attention": None, "mask_token_id": MASK, "eos_token_id": END,
}  # fmt: skip


def weights(config, seed=0):
    """Random tensors under the names of the released files."""
    rng = np.random.default_rng(seed)
    width, inner = config["d_model"], config["mlp_hidden_size"]
    shared = width // config["n_heads"] * config["n_kv_heads"]

    def draw(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    tensors = {
        "wte.weight": draw(config["embedding_size"], width),
        "ln_f.weight": 1 + draw(width),
        "ff_out.weight": draw(config["embedding_size"], width),
    }
    shapes = {
        "q_proj": (width, width), "k_proj": (shared, width), "v_proj": (shared, width), "attn_out": (width, width),
        "ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner),
    }  # fmt: skip
    for layer in range(config["n_layers"]):
        for name, shape in shapes.items():
            tensors[f"blocks.{layer}.{name}.weight"] = draw(*shape)
        for name in ("attn_norm", "ff_norm"):
            tensors[f"blocks.{layer}.{name}.weight"] = 1 + draw(width)
    return {f"model.transformer.{name}": tensor for name, tensor in tensors.items()}


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "<mask>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<mask>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))
    save_file(weights(CONFIG), folder / "model.safetensors")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llada") / "tiny")


def reference(tensors, tokens, config=CONFIG):
    """The network of the paper's release in float64: a Llama whose attention has no mask."""
    get = lambda name: np.asarray(tensors[f"model.transformer.{name}.weight"], np.float64)  # noqa: E731
    heads, shared = config["n_heads"], config["n_kv_heads"]
    size = config["d_model"] // heads

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * get(name)

    def rotate(x):
        angles = np.arange(len(tokens))[:, None] * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = np.concatenate([angles, angles], axis=-1)[:, None]
        half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1)
        return x * np.cos(angles) + half * np.sin(angles)

    x = get("wte")[tokens]
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}."
        y = norm(x, block + "attn_norm")
        q = rotate((y @ get(block + "q_proj").T).reshape(len(y), heads, size))
        k = rotate((y @ get(block + "k_proj").T).reshape(len(y), shared, size)).repeat(heads // shared, axis=1)
        v = (y @ get(block + "v_proj").T).reshape(len(y), shared, size).repeat(heads // shared, axis=1)
        scores = np.exp(np.einsum("thd,shd->hts", q, k) / np.sqrt(size))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(y), -1) @ get(block + "attn_out").T
        y = norm(x, block + "ff_norm")
        gate = y @ get(block + "ff_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ get(block + "up_proj").T)) @ get(block + "ff_out").T
    return norm(x, "ln_f") @ get("ff_out").T


TOKENS = np.random.default_rng(3).integers(3, 127, 12)
TOKENS[[1, 4, 5, 9]] = MASK


def test_logits_match_the_forward_pass_written_out(folder):
    model = MaskedDiffusion.load(folder, length=12, dtype=np.float32)
    expected = reference(weights(CONFIG), TOKENS)
    np.testing.assert_allclose(model.denoiser(jnp.asarray(TOKENS)), expected, rtol=1e-4, atol=1e-4)
    expected[:, MASK] = -np.inf
    expected -= np.logaddexp.reduce(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.log_probs(jnp.asarray(TOKENS)), expected, rtol=1e-4, atol=1e-4)
    assert (model.mask_token, model.vocabulary_size, model.end_tokens) == (MASK, 128, (END,))


def test_a_prompt_comes_before_what_is_generated(folder):
    model = MaskedDiffusion.load(folder, length=8, dtype=np.float32).after(TOKENS[:1])
    expected = reference(weights(CONFIG), np.concatenate([TOKENS[:1], TOKENS[1:9]]))[1:]
    np.testing.assert_allclose(model.denoiser(jnp.asarray(TOKENS[1:9])), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_generates_texts_in_blocks(folder):
    model = MaskedDiffusion.load(folder, length=8, dtype=np.float32).after("Hi")
    from ppl.models.masked import MostConfident

    process = model.reverse(8, MostConfident(0.2).blocks(4))
    posterior = ppl.infer(process**2.0, SMC(4), seed=1)
    tokens = np.asarray(posterior.value["tokens"])
    assert tokens.shape == (4, 8) and not np.any(tokens == MASK)
    lengths = [int(np.flatnonzero(row == END)[0]) if END in row else 8 for row in tokens]
    assert posterior.value["length"].tolist() == lengths
    assert posterior.texts == [model.tokenizer.decode(t[:n].tolist()) for t, n in zip(tokens, lengths, strict=True)]
    with compilations() as names:
        ppl.infer(process**2.5, SMC(4), seed=2)
    assert not names


def test_weights_are_arguments_of_the_compiled_program(folder):
    model = MaskedDiffusion.load(folder, length=4, dtype=np.float32)
    from ppl.inference.population import lower

    text = lower(model.reverse(2).program(), SMC(2)).as_text()
    assert "tensor<32x128xf32>" in text
    constants = [line for line in text.splitlines() if "32x128xf32" in line and "constant" in line]
    assert all('dense<"0x' not in line and "dense_resource" not in line for line in constants)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alibi": True}, "`alibi` = True is not supported; accepted is False"),
        ({"block_type": "sequential"}, "`block_type` = 'sequential' is not supported; accepted is 'llama'"),
        ({"layer_norm_type": "default"}, "`layer_norm_type`"),
        ({"include_bias": True}, "`include_bias`"),
        ({"d_model": 30}, "`d_model` must be a multiple of `n_heads`, got 30 and 4"),
        ({"d_model": "left out"}, "no entry `d_model`"),
        ({"model_type": "llada_moe"}, "unknown architecture: .* 'llada_moe'; accepted are .*llada"),
        ({"mask_token_id": 500}, "`mask_token_id` is 500; the vocabulary has 128 tokens"),
        ({"mask_token_id": "left out"}, "`mask_token_id` is 126336"),
        ({"mlp_hidden_size": 40}, r"has shape \(48, 32\); .* calls for \(40, 32\)"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion.load(write(tmp_path / "changed", **change), length=4)


def test_settings_of_the_released_file_that_change_nothing_are_read(tmp_path):
    config = DecoderConfig.from_hf(CONFIG | {"embedding_size": None, "n_kv_heads": None, "mlp_hidden_size": None})
    assert (config.vocab_size, config.num_kv_heads, config.intermediate_size) == (126, 4, 128)
    assert not config.causal and DecoderConfig.from_hf(CONFIG | {"multi_query_attention": True}).num_kv_heads == 2


def test_networks_of_the_other_kind_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds a llada network; load it with ppl.models.MaskedDiffusion"):
        LanguageModel.load(folder)
    causal = dict(
        model_type="llama", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(causal))
    with pytest.raises(ValueError, match="holds a llama network; load it with ppl.models.LanguageModel"):
        MaskedDiffusion.load(tmp_path, length=4)
    from flax import nnx

    with pytest.raises(ValueError, match="reads from left to right"):
        DecoderDenoiser(Decoder(DecoderConfig.from_hf(causal), rngs=nnx.Rngs(0)))
    both_ways = Decoder(DecoderConfig.from_hf(CONFIG), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot be extended by a token"):
        both_ways.extend(None, jnp.int32(3))


def test_lengths_beyond_the_context_are_refused(folder):
    with pytest.raises(ValueError, match="`length` must be at most the model's context of 64, got 65"):
        MaskedDiffusion.load(folder, length=65)
    model = MaskedDiffusion.load(folder, length=60).after([5] * 5)
    with pytest.raises(ValueError, match="make 65 tokens; the model's context holds 64"):
        model.reverse(4)


def test_tensors_are_all_needed(folder, tmp_path):
    changed = write(tmp_path / "more")
    tensors = load_file(changed / "model.safetensors")
    save_file(tensors | {"model.transformer.wpe.weight": np.zeros((4, 4), np.float32)}, changed / "model.safetensors")
    with pytest.raises(ValueError, match="no use for: `model.transformer.wpe.weight`"):
        MaskedDiffusion.load(changed, length=4)
    assert jax.tree.leaves(weights(CONFIG))  # the fixture itself is whole
