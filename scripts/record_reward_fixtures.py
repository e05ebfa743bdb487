"""Record what the torch implementations in transformers compute, as fixtures for the tests of rewards.

Run in an environment with torch, transformers and safetensors (this project's own code is not imported):

    python scripts/record_reward_fixtures.py path/to/all-MiniLM-L6-v2

It writes to `tests/fixtures/rewards`: one folder for each tiny random reward model (`save_pretrained`, with
`expected.npz` holding token ids, lengths and values), and `minilm.npz` with texts, their pieces and the real encoder's
vectors.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "rewards"
SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SEPARATOR = 7
LENGTHS = (1, 9, 24, 40)
TEXTS = [
    "The ship sank in the storm.",
    "A vessel went down in bad weather.",
    "I had pancakes for breakfast!",
    "naïve café — Ünïcode, 日本語 and numbers: 3.14159",
    "",
    "antidisestablishmentarianism floccinaucinihilipilification",
    " ".join(f"Sentence number {i} says that the sum of {i} and {i} is {2 * i}." for i in range(30)),
]


class _TwoLayers(transformers.Qwen2PreTrainedModel):
    """Qwen's reward models, after modeling_qwen2_rm.py of Qwen/Qwen2.5-Math-PRM-7B."""

    outputs = 1

    def __init__(self, config):
        super().__init__(config)
        self.model = transformers.Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.outputs))
        self.post_init()

    def forward(self, tokens, attention_mask):
        return self.score(self.model(tokens, attention_mask=attention_mask).last_hidden_state)


class Qwen2ForRewardModel(_TwoLayers):
    """The value at the last token."""


class Qwen2ForProcessRewardModel(_TwoLayers):
    """Two logits at each token."""

    outputs = 2


def tiny_models() -> dict[str, nn.Module]:
    """The random networks."""
    t = transformers
    return {
        "llama": t.LlamaForSequenceClassification(t.LlamaConfig(**SMALL, num_labels=1)),
        "qwen2": t.Qwen2ForSequenceClassification(t.Qwen2Config(**SMALL, num_labels=1)),
        "qwen3": t.Qwen3ForSequenceClassification(t.Qwen3Config(**SMALL, head_dim=16, num_labels=1)),
        "two_layers": Qwen2ForRewardModel(t.Qwen2Config(**SMALL, num_labels=1)),
        "process": Qwen2ForProcessRewardModel(t.Qwen2Config(**SMALL)),
    }


def record_tiny(name: str, model: nn.Module) -> None:
    """Randomise all parameters, biases and norms too; save the network and its values."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(float("norm" in key and key.endswith("weight")) + 0.2 * noise)
        tokens = torch.randint(8, 128, (len(LENGTHS), max(LENGTHS)), generator=generator)
        tokens[:, 4::5] = SEPARATOR
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens = torch.where(real, tokens, 0)
        model = model.eval()
        if name == "process":
            values = torch.softmax(model(tokens, attention_mask=real.long()), dim=-1)[..., 1]
        elif name == "two_layers":
            values = model(tokens, attention_mask=real.long())[torch.arange(len(LENGTHS)), lengths - 1, 0]
        else:
            values = model(tokens, attention_mask=real.long()).logits[:, 0]
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy(),
        lengths=lengths.numpy(),
        values=values.numpy(),
        separator=SEPARATOR,
    )


def record_encoder(folder: Path) -> None:
    """The real encoder: pieces, and the mean over them, scaled to length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    vectors = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    np.savez_compressed(
        FIXTURES / "minilm.npz",
        texts=np.array(TEXTS),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        lengths=batch["attention_mask"].sum(1).numpy().astype(np.int32),
        vectors=vectors.numpy(),
    )


def main() -> None:
    """Record everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path, help="the folder of all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name, model in tiny_models().items():
        record_tiny(name, model)
    record_encoder(arguments.encoder)


if __name__ == "__main__":
    main()
