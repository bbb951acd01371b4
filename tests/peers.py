"""Other projects' own test suites against foretell: stand-ins for what they load from a hub, and the classes changed.

tests/peers.md says how to run it. As a script it builds the stand-ins; as a pytest plugin (-p peers) it puts
foretell's SFTTrainer and GRPOTrainer in TRL's place (FORETELL_PEERS=trl, or trl-off with no module), or lets every
generate of transformers that foretell can do go through foretell (FORETELL_PEERS=generate), counted at the end.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

SENTENCES = [
    "A river finds the shortest way down.", "Nobody counts the stars twice.", "Bread tastes best on the first day.",
    "Old maps lie about new roads.", "The smallest key opens the largest door.", "Snow makes every street quiet.",
    "A good question is half of its answer.", "Ships turn slowly and stop late.", "Every clock is right for someone.",
    "The wind reads no signposts.", "Two bells ring louder than one.", "A garden forgives the winter.",
    "Bridges are built from both sides.", "The cat knows the warm stone.", "Rain is early, trains are late.",
    "A candle loses nothing by lighting another.", "The second draft is shorter.",
]  # fmt: skip


def make(folder: Path, ids: list[str]) -> None:
    """Folders that from_pretrained and load_dataset find by a hub's names when tests run in `folder`."""
    import transformers
    from tiny import ARCHITECTURES
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers.decoders import ByteLevel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SCORES

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2], unk_token=None
    )
    template = resources.files("trl").joinpath("chat_templates", "qwen2_5.jinja")
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    kinds = {name: kind for kind, name in KNOWN.items() if isinstance(name, str) and name.endswith("ForCausalLM")}
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    scores = {name: kind for kind, name in SCORES.items() if isinstance(name, str)}
    for name in ids:
        score = scores.get(name.split("/")[-1].removeprefix("tiny-").split("-")[0])
        if score is not None:
            config = transformers.AutoConfig.for_model(
                score, **{**ARCHITECTURES.get(score, {}), **sizes, "num_labels": 1}
            )
            transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        kind = kinds.get(name.split("/")[-1].removeprefix("tiny-").split("-")[0])
        if kind is None:
            continue
        config = transformers.AutoConfig.for_model(kind, **{**ARCHITECTURES.get(kind, {}), **sizes})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {kind}")
    asked = [{"role": "user", "content": f"{text[: len(text) // 2]}"} for text in SENTENCES]
    told = [{"role": "assistant", "content": f"{text[len(text) // 2 :]}"} for text in SENTENCES]
    rows: dict[str, list[dict[str, Any]]] = {
        "standard_language_modeling": [{"text": text} for text in SENTENCES],
        "conversational_language_modeling": [{"messages": [a, b]} for a, b in zip(asked, told)],
        "standard_prompt_completion": [
            {"prompt": a["content"], "completion": b["content"]} for a, b in zip(asked, told)
        ],
        "standard_prompt_only": [{"prompt": a["content"]} for a in asked],
        "conversational_prompt_only": [{"prompt": [a]} for a in asked],
        "conversational_prompt_completion": [{"prompt": [a], "completion": [b]} for a, b in zip(asked, told)],
    }
    zen = folder / "trl-internal-testing" / "zen"
    zen.mkdir(parents=True, exist_ok=True)
    card = ["---", "configs:"]
    for name, given in rows.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", given), ("test", given[:2])):
            (zen / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            card += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
    (zen / "README.md").write_text("\n".join([*card, "---", ""]))


# -- the plugin --------------------------------------------------------------------------------------------------------

counts: collections.Counter = collections.Counter()


def pytest_configure(config: Any) -> None:
    """Before any test module is imported."""
    what = os.environ.get("FORETELL_PEERS", "")
    if what.startswith("trl"):
        import trl

        from foretell.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

        class Config(SFTConfig):
            """Module on unless it is told otherwise."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.setdefault("mtp_enabled", what == "trl")
                super().__init__(*args, **kwargs)

        class RolloutConfig(GRPOConfig):
            """A new module that drafts and learns, but where something else of TRL's rolls out."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                others = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")
                if what == "trl":
                    kwargs.setdefault("mtp_preset", "fastmtp")
                    kwargs.setdefault("mtp_drafter", "none" if any(map(kwargs.get, others)) else "mtp+history")
                super().__init__(*args, **kwargs)

        for made in (Config, RolloutConfig):  # checkpoints pickle them
            made.__qualname__ = made.__name__
            globals()[made.__name__] = made
        trl.SFTConfig, trl.SFTTrainer = Config, SFTTrainer
        trl.GRPOConfig, trl.GRPOTrainer = RolloutConfig, GRPOTrainer
    elif what == "generate":
        from transformers.generation import GenerationMixin

        plain = GenerationMixin.generate

        def generate(self: Any, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
            """Through foretell with lookup drafts where it takes the call, as transformers' own where it refuses."""
            if custom_generate is not None or getattr(self, "_foretell_inside", False):
                return plain(self, *args, custom_generate=custom_generate, **kwargs)
            from foretell import MTPModel, SequentialConfig

            try:
                self._foretell_inside = True
                mtp = MTPModel(self, SequentialConfig(depth=1))
                out = mtp.generate(*args, drafter="lookup", num_draft_tokens=3, **kwargs)
                counts["by foretell"] += 1
                return out
            except ValueError as error:
                counts[f"refused: {str(error)[:60]}"] += 1
                out = plain(self, *args, **kwargs)
                asked = {name for name in kwargs if name.startswith("output_")}
                if "cannot honour: output_" in str(error) and kwargs.get("do_sample") is False:
                    bare = {name: value for name, value in kwargs.items() if name not in asked}
                    with contextlib.suppress(ValueError):  # what else it cannot honour
                        again = mtp.generate(*args, drafter="lookup", num_draft_tokens=3, **bare)
                        texts = [getattr(one, "sequences", one) for one in (again, out)]
                        assert texts[0].tolist() == texts[1].tolist(), "foretell says another text"
                        counts["by both, the same text"] += 1
                return out
            finally:
                self._foretell_inside = False

        GenerationMixin.generate = generate  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much went through foretell."""
    for name, count in counts.most_common():
        terminalreporter.write_line(f"{count:6} {name}")


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:])
