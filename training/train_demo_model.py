"""Train the demo checkpoint: a small LLaMA in which massive activations emerge by themselves.

    python training/train_demo_model.py --texts DIR --out DIR --compile

Nothing is planted. Two heads, sequences of 32 behind a constant start token and a high constant
rate make attention sinks appear within minutes on one CPU core, and with them the massive
activation that carries them. Weight decay keeps the ordinary channels small; it spares the one
neuron a block that writes the most into the channel that holds the largest magnitude at the time,
whichever that is. `--way none` trains the same model on sequences without a start token, `--way
bias` on these with explicit attention biases, `--way both` with the start token and the biases.
`training_log.jsonl` holds the largest magnitudes of every block through training; every checkpoint
that it measures is kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import biassurgery as bs

START = "<s>"
# characters at the head of every file, kept for calibration (first half) and evaluation (second
# half)
HELD_OUT = 120_000


def read_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out text of every .txt file (Gutenberg notices already cut) of `folder`, in
    name order.
    """
    texts = [
        path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))
    ]
    return [text[HELD_OUT:] for text in texts], [text[:HELD_OUT] for text in texts]


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (line for text in texts for line in text.splitlines(keepends=True)),
        vocab_size=vocab_size,
        special_tokens=[START],
        show_progress=False,
    )
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    raw = bpe._tokenizer
    raw.post_processor = Sequence(
        [
            ByteLevel(trim_offsets=False),
            TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=START, model_max_length=max_length
    )


def windows(
    ids: torch.Tensor, rows: int, length: int, generator: torch.Generator, start: bool
) -> torch.Tensor:
    """(rows, length) int64: the start token if asked for, then consecutive tokens from a random
    place.
    """
    at = torch.randint(len(ids) - length, (rows, 1), generator=generator)
    body = ids[at + torch.arange(length - start)]
    return torch.cat([torch.zeros(rows, int(start), dtype=body.dtype), body], 1)


@torch.no_grad()
def measure(model: LlamaForCausalLM, batch: torch.Tensor) -> dict:
    """Held-out loss and, per block output, the three largest magnitudes (token, channel, value) and
    the median magnitude.
    """
    out = model(batch, labels=batch, output_hidden_states=True, use_cache=False)
    blocks = []
    for hidden in out.hidden_states[1:-1]:  # the last entry has passed the final norm
        magnitude = hidden.float().abs()
        width = magnitude.shape[-1]
        top = magnitude.flatten(1).topk(3).values.mean(0)
        where = magnitude[0].flatten().topk(3).indices
        blocks.append(
            dict(
                top=[round(v, 1) for v in top.tolist()],
                median=round(magnitude.median().item(), 3),
                where=[
                    [i // width, i % width, round(hidden[0].flatten()[i].item(), 1)]
                    for i in where.tolist()
                ],
            )
        )
    return dict(loss=round(out.loss.item(), 4), blocks=blocks)


def massive_neurons(model: LlamaForCausalLM, massive: int) -> list[torch.Tensor]:
    """Views of the weights of the one neuron a block that writes the most into channel
    `massive`.
    """
    views = []
    for block in model.model.layers:
        mlp = block.mlp
        neuron = int(mlp.down_proj.weight[massive].abs().argmax())
        views += [
            mlp.gate_proj.weight.data[neuron],
            mlp.up_proj.weight.data[neuron],
            mlp.down_proj.weight.data[massive, neuron],
        ]
    return views


def step_without_decay_of(kept: list[torch.Tensor], optimizer: torch.optim.AdamW) -> None:
    """One AdamW step whose weight decay spares `kept`: ordinary channels stay small, the massive
    one grows as without decay.
    """
    group = optimizer.param_groups[0]
    decayed = [view * (group["lr"] * group["weight_decay"]) for view in kept]
    optimizer.step()
    for view, lost in zip(kept, decayed):
        view.add_(lost)


def rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, constant, then linear decay to a tenth over the last `cooldown` steps."""
    left = max(0, args.steps - step) / max(1, args.cooldown)
    return args.rate * min(1.0, (step + 1) / args.warmup, 0.1 + 0.9 * left)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in dict(
        steps=14_000,
        warmup=100,
        cooldown=3_000,
        batch=128,
        length=32,
        vocab=1024,
        width=96,
        inner=256,
        blocks=4,
        heads=2,
        seed=0,
        threads=1,
        every=250,
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument(
        "--decay",
        type=float,
        default=0.1,
        help="weight decay; it spares the neuron that writes the massive activation",
    )
    parser.add_argument(
        "--way",
        choices=["start", "none", "bias", "both"],
        default="start",
        help="what there is to attend to when nothing else is",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the training step (1.4x faster on one core)"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, held_out = read_texts(args.texts)
    tokenizer = train_tokenizer(train, args.vocab, args.length)

    def encode(texts):
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return torch.cat([torch.tensor(row) for row in rows])

    ids = encode(train)
    held = encode(held_out)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if args.way in ("bias", "both"):
        bs.patch_model(model, "attention_bias", kind="kv", init="normal")
    step_model = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=args.decay
    )
    generator = torch.Generator().manual_seed(args.seed)
    check = windows(
        held, 256, args.length, torch.Generator().manual_seed(1), args.way in ("start", "both")
    )
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "training_log.jsonl").open("w")
    log.write(
        json.dumps(
            dict(
                parameters=sum(p.numel() for p in model.parameters()),
                tokens=len(ids),
                held_out=len(held),
                **{k: v for k, v in vars(args).items() if k not in ("texts", "out")},
            )
        )
        + "\n"
    )
    started = time.time()
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            measured = measure(model, check)
            massive = max(
                (top for block in measured["blocks"] for top in block["where"]),
                key=lambda top: abs(top[2]),
            )[1]
            log.write(
                json.dumps(
                    dict(
                        step=step,
                        seconds=round(time.time() - started),
                        massive_channel=massive,
                        **measured,
                    )
                )
                + "\n"
            )
            log.flush()
            folder = args.out / f"step_{step}"
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        batch = windows(ids, args.batch, args.length, generator, args.way in ("start", "both"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_without_decay_of(massive_neurons(model, massive), optimizer)
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
