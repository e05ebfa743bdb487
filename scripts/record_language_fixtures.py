"""Record what the torch implementations in transformers compute, as fixtures for the language model tests.

Run in an environment with torch, transformers, safetensors and gguf (this project's own code is not imported):

    python scripts/record_language_fixtures.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

It writes to `tests/fixtures/language`: one folder for each tiny random network (`save_pretrained`, with `expected.npz`
holding token ids and all logits), and `smollm2.json` with the real network's greedy continuations and logits and its
tokenizer's ids.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "language"

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

PROMPTS = ["The capital of France is", "Once upon a time, in 1999, there was a"]
MESSAGES = [{"role": "user", "content": "Name a fruit."}]
TEXTS = [
    "",
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   three\t tab",
    "line\nbreak\r\nand\n\n\nmore \n",
    "1234567890 3.14 1,000 a1b2 x²½",
    "It's we'll I'VE they'd",
    "naïve café Ünïcode ﬁ",
    "日本語のテキスト 中文 한국어",
    "emoji 👩‍👩‍👧 🎉!",
    "def f(x):\n    return {'a': x[0] ** 2}  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "https://example.org/?q=1&r=%20",
    "   \n  \t ",
    "\u00a0no-break \u2028 separators\u200b",
    "ЁЖИК в тумане; العربية",
]


def tiny_models() -> dict[str, tuple[torch.nn.Module, dict]]:
    """The random networks, and what `save_pretrained` is asked for each."""
    t = transformers
    llama = dict(SMALL, num_attention_heads=4)
    qwen = dict(SMALL, num_attention_heads=4, num_key_value_heads=2)
    gpt2 = t.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    return {
        "llama2": (t.LlamaForCausalLM(t.LlamaConfig(**llama)), {}),
        "llama3": (
            t.LlamaForCausalLM(t.LlamaConfig(**llama, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE)),
            dict(max_shard_size="30kB"),
        ),
        "llama_linear": (
            t.LlamaForCausalLM(
                t.LlamaConfig(**llama, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))
            ),
            {},
        ),
        "llama_tied": (
            t.LlamaForCausalLM(t.LlamaConfig(**llama, num_key_value_heads=1, tie_word_embeddings=True)),
            {},
        ),
        "qwen2": (t.Qwen2ForCausalLM(t.Qwen2Config(**qwen)), {}),
        "qwen3": (t.Qwen3ForCausalLM(t.Qwen3Config(**qwen, head_dim=16)), {}),
        "gpt2": (t.GPT2LMHeadModel(gpt2), {}),
    }


def record_tiny(name: str, model: torch.nn.Module, saving: dict) -> None:
    """Randomise all parameters, biases and norms too, save the network and its logits."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in key or "ln_" in key else 0.0
            parameter.copy_(centre * (key.endswith("weight")) + 0.2 * noise)
        tokens = torch.randint(0, 128, (48,), generator=generator)
        logits = model.eval()(tokens[None]).logits[0]
    model.save_pretrained(folder, **saving)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())


def greedy(model: torch.nn.Module, tokens: list[int], steps: int) -> dict:
    """The greedy continuation, and the logits after the prompt: the best 64 and every 97th."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].float().numpy()
        continued = model.generate(torch.tensor([tokens]), max_new_tokens=steps, do_sample=False, pad_token_id=0)
    best = np.argsort(-logits)[:64]
    return dict(
        tokens=tokens,
        greedy=continued[0, len(tokens) :].tolist(),
        best=best.tolist(),
        best_logits=logits[best].astype(float).round(6).tolist(),
        every_97th=logits[::97].astype(float).round(6).tolist(),
    )


def record_smollm2(path: Path) -> None:
    """The real network, read and dequantised by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # go on to the asked length
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompts = [*PROMPTS, chat]
    record = dict(
        prompts=[
            dict(text=text, **greedy(model, tokenizer.encode(text, add_special_tokens=False), 24)) for text in prompts
        ],
        messages=MESSAGES,
        encodings=[dict(text=text, tokens=tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS],
    )
    FIXTURES.mkdir(parents=True, exist_ok=True)
    (FIXTURES / "smollm2.json").write_text(json.dumps(record, ensure_ascii=True) + "\n")


def main() -> None:
    """Record everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct in GGUF")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, (model, saving) in tiny_models().items():
        record_tiny(name, model, saving)
    record_smollm2(arguments.gguf)


if __name__ == "__main__":
    main()
