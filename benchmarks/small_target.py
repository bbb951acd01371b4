"""The small target: a chat model of a few million parameters, trained from scratch on two CPU cores in 20 minutes.

    FORETELL_DATA=DIR python benchmarks/small_target.py --out runs/small-target [--minutes 20]

Where other work shares the cores, OMP_WAIT_POLICY=passive in the environment keeps the threads from spinning.
Methods that need many epochs or a trainable target are compared on a target this small. It need not be right: it must
answer fluently, and its own greedy text must be worth predicting. The folder is an ordinary transformers one, with
small_target.json beside the weights; nothing of the data is copied. training_chats and held_out_chats give other
benchmarks the chats that it has and has not seen.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import left_padded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foretell.config import parse
from foretell.data.prompts import encode_prompt
from foretell.runtime import Progress, atomic_folder, provenance, write_json_atomic

# B rows in a batch, T positions of a row.

FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "gpteacher_codegen.json", "torchspec_conversations.jsonl")
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]  # ids 0 to 3
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"  # a system turn reads as the user's
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY, ROW_TOKENS = 4096, 512
ROWS = 2  # of a step: there is time for few tokens, and they teach more in many small steps
LEARNING_RATE, WARMUP_STEPS = 2e-3, 50
CHECKED_PROMPTS, CHECKED_TOKENS = 48, 96

Chat = list[dict[str, str]]


@dataclass(kw_only=True)
class SmallTargetSettings:
    """Flags of benchmarks/small_target.py."""

    out: str = field(default="runs/small-target", metadata={"help": "Folder for model, tokenizer and numbers."})
    minutes: float = field(default=20.0, metadata={"help": "Of training; validation takes one more."})
    bf16: bool = field(
        default=False, metadata={"help": "Multiply in bf16: faster, but only on a CPU with instructions for it (AMX)."}
    )

    def problems(self) -> list[str]:
        """See config.check."""
        return [] if self.minutes > 0 else [f"minutes: got {self.minutes}, wanted more than 0."]


# -- the chats ---------------------------------------------------------------------------------------------------------


def find_data() -> Path:
    """The folder that FORETELL_DATA names, with all files in it.

    Raises:
        ValueError: it is unset, or files are missing.
    """
    named = os.environ.get("FORETELL_DATA")
    missing = [name for name in FILES if not named or not (Path(named) / name).is_file()]
    if missing:
        got = f"{named} without {', '.join(missing)}" if named else "nothing"
        raise ValueError(
            f"FORETELL_DATA: got {got}, wanted a folder with {', '.join(FILES)}. "
            "Put them into one folder and name it: export FORETELL_DATA=DIR."
        )
    return Path(named)


def training_chats(data_folder: str | Path) -> list[Chat]:
    """The conversations that the small target learns."""
    return [chat for learned, _ in _sources(Path(data_folder)).values() for chat in learned]


def held_out_chats(data_folder: str | Path) -> list[Chat]:
    """Conversations it never sees: GSM8K's test questions first, then every 20th question of the other two."""
    return [chat for _, held_out in _sources(Path(data_folder)).values() for chat in held_out]


def _sources(folder: Path) -> dict[str, tuple[list[Chat], list[Chat]]]:
    """Of each data set: the chats to learn, and those held out."""
    gsm8k = [
        [_chat(row["question"], row["answer"]) for row in _json_lines(folder / name)]
        for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
    ]
    code = [
        _chat("\n".join(filter(None, (row["instruction"], row["input"]))), row["response"])
        for row in json.loads((folder / "gpteacher_codegen.json").read_text(encoding="utf-8"))
    ]
    talk = [row["conversations"] for row in _json_lines(folder / "torchspec_conversations.jsonl")]
    return {"gsm8k": (gsm8k[0], gsm8k[1]), "codegen": _split(code), "torchspec": _split(talk)}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _split(chats: list[Chat]) -> tuple[list[Chat], list[Chat]]:
    """By the first question, because some are asked many times: no held-out question is also learned."""
    held_out = set(list(dict.fromkeys(chat[0]["content"] for chat in chats))[::20])
    return (
        [chat for chat in chats if chat[0]["content"] not in held_out],
        [chat for chat in chats if chat[0]["content"] in held_out],
    )


# -- the model ---------------------------------------------------------------------------------------------------------


def make_tokenizer(chats: list[Chat]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the chats, digits apart so that numbers are copied digit by digit, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((message["content"] for chat in chats for message in chat), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=["<|user|>", "<|assistant|>"], padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=256**-0.5,  # unit output at any width: 0.02 starts a model this narrow slowly
    )  # fmt: skip
    return LlamaForCausalLM(config)


# -- training ----------------------------------------------------------------------------------------------------------


def packed_rows(chats: list[Chat], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All chats in one stream, cut into rows [N, T]. A chat may be cut, and sees the one before it in its row."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    return stream[: len(stream) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Batches [B, T] for ever, in a new order each epoch."""
    while True:
        yield from rows[torch.randperm(len(rows))].split(ROWS)


def train(model: LlamaForCausalLM, rows: Tensor, seconds: float, bf16: bool) -> dict[str, Any]:
    """By the clock: the rate falls to a tenth by a cosine over the time given, so any machine ends its schedule."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]  # not decayed: their neutral value is 1
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    model.train()
    started = time.monotonic()
    with Progress("train", unit="tok") as bar:
        for batch_BT in batches(rows):
            share = (time.monotonic() - started) / seconds
            if share >= 1:
                break
            rate = LEARNING_RATE * min((len(losses) + 1) / WARMUP_STEPS, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # weights and optimizer stay fp32
                loss = model(input_ids=batch_BT, labels=batch_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if share > 0.01:  # how many tokens there is time for is known once some are done
                bar.total = round(bar.done / share)
            bar.update(batch_BT.numel(), step=len(losses), loss=_last_mean(losses))
    return {
        "train_loss": _last_mean(losses),
        "steps": len(losses),
        "tokens": bar.done,
        "epochs": bar.done / rows.numel(),
        "minutes": bar.seconds / 60,
        "tokens_per_second": bar.done / bar.seconds,
    }


def _last_mean(losses: list[float]) -> float:
    last = losses[-100:]
    return sum(last) / len(last)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Over all tokens of the rows, questions included, as in training."""
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(ROWS))
    return total / len(rows)


# -- the answers -------------------------------------------------------------------------------------------------------


def check_answers(folder: Path, chats: list[Chat]) -> dict[str, Any]:
    """Greedy answers of the saved folder: the share that loops, and three to look at."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = left_padded([encode_prompt({"messages": chat}, tokenizer) for chat in chats], model.device)
    out = model.generate(**inputs, max_new_tokens=CHECKED_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [[token for token in row if token != tokenizer.pad_token_id] for row in out.tolist()]
    return {
        "prompts": len(answers),
        "new_tokens": CHECKED_TOKENS,
        "loops": sum(map(loops, answers)) / len(answers),
        "ended": sum(answer[-1] == tokenizer.eos_token_id for answer in answers) / len(answers),
        "samples": [tokenizer.decode(answer) for answer in answers[:3]],
    }


def loops(answer: list[int]) -> bool:
    """Whether fewer than half of the answer's runs of four tokens are distinct. Short answers have no time to loop."""
    runs = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return len(runs) >= 20 and len(set(runs)) < len(runs) / 2


def run(settings: SmallTargetSettings, data: Path) -> dict[str, Any]:
    """Tokenizer, model, training, validation, check; all of it appears at settings.out, or nothing."""
    torch.manual_seed(0)
    chats = training_chats(data)
    random.Random(0).shuffle(chats)  # the sources mixed, also within a row
    with atomic_folder(settings.out) as folder:  # first: a place that cannot be written is said before the training
        tokenizer = make_tokenizer(chats)
        rows = packed_rows(chats, tokenizer)
        model = make_model(tokenizer)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters / 1e6:.2f} M parameters, {len(chats):,} chats, {rows.numel():,} tokens", flush=True)
        result: dict[str, Any] = {"provenance": provenance(sys.argv), "parameters": parameters}
        result |= train(model, rows, 60 * settings.minutes, settings.bf16)
        held_out = {name: chats for name, (_, chats) in _sources(data).items()}
        result["validation_loss"] = {
            name: mean_loss(model, packed_rows(chats, tokenizer)) for name, chats in held_out.items()
        }
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        result["answers"] = check_answers(folder, held_out["gsm8k"][:CHECKED_PROMPTS])
        write_json_atomic(folder / "small_target.json", result)
    return result


def main() -> None:
    """Train, print the numbers; 2 is a user's error."""
    try:
        settings, data = parse(SmallTargetSettings, prog="benchmarks/small_target.py"), find_data()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    result = run(settings, data)
    validation = "  ".join(f"{name} {loss:.3f}" for name, loss in result["validation_loss"].items())
    print(
        f"{result['tokens']:,} tokens in {result['minutes']:.1f} minutes ({result['tokens_per_second']:.0f} tok/s), "
        f"loss {result['train_loss']:.3f}; validation: {validation}; "
        f"{result['answers']['loops']:.0%} of {result['answers']['prompts']} greedy answers loop"
    )


if __name__ == "__main__":
    main()
