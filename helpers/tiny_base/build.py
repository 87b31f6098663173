"""Rebuild the tiny Qwen2 base from nothing: tokenizer, corpus, pre-training, manifest. `make tiny-base`.

The base stands in for the Qwen2.5-Instruct that other profiles download: it knows the language of the synthetic hospital before
it is adapted. Its corpus is plain text: textbook-like prose made from the casebook and ICD-10-CM titles, and whole discharge
summaries of patients of *other* hospitals (seeds from HOSPITAL_SEED on; the course's own are 0 to 99). It never holds
the answer format, nor a patient of the course. What it saw of labels: every document names the diagnosis of its patient,
most with the code. `labelled_notes` gives the same labels to any baseline.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from helpers import icd, prompts, synthetic

HERE = Path(__file__).parent
HOSPITAL_SEED = 1000  # the course's hospitals have seeds below
HELD_OUT_SEED = 900
STEPS = 5000
RATE = 2e-3  # of learning, at the top
EARLY = 0.2  # of the steps
VOCABULARY = 2560
RECIPE = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))
CONFIG, KINDS = {"vocab_size": VOCABULARY} | RECIPE["config"], RECIPE["kinds"]


def _index(rng: np.random.Generator) -> str:
    """A page of an index: categories of the casebook by chapter; or a few lines of a glossary."""
    if rng.random() < 0.35:
        return "\n".join(
            RECIPE["glossary"][i] for i in rng.permutation(len(RECIPE["glossary"]))[:5]
        )
    by_chapter: dict[str, list[str]] = {}
    for category in sorted({str(icd.category(code)) for code in synthetic.casebook().codes}):
        by_chapter.setdefault(icd.chapter_short(icd.chapter(category) or 22), []).append(category)
    lines = []
    for name in rng.permutation(list(by_chapter))[:6]:
        some = rng.permutation(by_chapter[name])[:3]
        lines.append(f"{name}: " + ", ".join(f"{c} {icd.title(c)}" for c in some))
    return "\n".join(lines)


def documents(count: int, seed: int, *, early: bool = False) -> Iterator[str]:
    """`count` documents of corpus: textbook vignettes, whole discharge summaries, admission notes with what a case conference
    said of them (which quotes from the note), marked-up records, pages of an index. `early`: mostly vignettes, which are
    short and name their diagnosis at once. A token that a base never saw has an embedding that no adapter above it can tell
    from others of its kind: so the corpus has the words of the prompt and of the answers, though never in the answer format."""
    book = synthetic.casebook()
    rng = np.random.default_rng([seed, 7])
    rows = synthetic.draw(count, seed, book)
    kinds = rng.choice(
        len(KINDS), size=count, p=[share[0 if early else 1] for share in KINDS.values()]
    )
    told = [row for row, kind in zip(rows, kinds, strict=True) if kind < 2]
    texts = iter(synthetic.summaries(told, seed, book=book))
    for row, kind in zip(rows, (list(KINDS)[i] for i in kinds), strict=True):
        code, title = row["code"], icd.title(row["code"]) or row["code"]
        category = icd.category(code) or ""
        names = {
            "who": "a man" if row["sex"] == "M" else "a woman",
            "title": title,
            "code": code,
            "cat": category,
            "category": icd.title(category),
            "chapter": icd.chapter_short(icd.chapter(code) or 22),
        }
        if kind == "summary":
            text = next(texts).strip()
            yield (
                text.replace(f"\n{title}\n", f"\n{title} ({code})\n")
                if rng.random() < 0.7
                else text
            )
        elif kind == "conference":
            yield _conference(next(texts), names, rng, book)
        elif kind == "index":
            yield _index(rng)
        else:
            own = [name for name in row["drawn"] if name in book.entries[code]["findings"]] or row[
                "drawn"
            ][:3]
            words = {
                name: str(rng.choice(book.findings[name]["phrases"]))
                for name in dict.fromkeys([*row["drawn"], *own])
            }
            if kind == "vignette":
                said = [words[own[i]] for i in rng.permutation(len(own))][:7] or ["no complaint"]
                text = str(rng.choice(RECIPE["vignettes"])).format(**names, f=", ".join(said))
                yield text[0].upper() + text[1:]
                continue
            fields = {"sex": row["sex"], "complaint": row["complaint"] or "none"}
            for name in synthetic.SECTIONS:
                fields[name] = (
                    "; ".join(words[f] for f in row["drawn"] if book.findings[f]["section"] == name)
                    or "none"
                )
            named = (
                str.capitalize if rng.random() < 0.5 else str
            )  # with <hpi> alone, `<` would always be part of a longer token
            shown = [(named(name), said) for name, said in fields.items() if rng.random() < 0.6]
            marked = "\n".join(f"<{name}>{said}</{name}>" for name, said in shown)
            yield str(rng.choice(RECIPE["record"])).format(**names, fields=marked)


def _conference(
    summary: str, names: dict[str, str | None], rng: np.random.Generator, book: synthetic.Casebook
) -> str:
    """An admission note, and a paragraph that quotes the findings in it that speak most for the diagnosis."""
    from helpers import notes

    note = notes.admission_note(summary)
    spans = {
        name: note[a:b]
        for name, present, a, b in reversed(synthetic.read_findings(note, book))
        if present
    }
    if not note:
        return summary.strip()
    cited, detail = synthetic.evidence(str(names["code"]), spans, book, int(rng.integers(2, 5)))
    key = "; ".join(spans[name] for name in cited) or "nothing specific"
    said = {"Chapter": names["chapter"], "key": key, "detail": spans.get(detail, "none")}
    text = str(rng.choice(RECIPE["conference"])).format(**names, **said)
    return f"{note}\n\n{text}"


def labelled_notes(count: int, seed: int = HOSPITAL_SEED) -> tuple[list[str], list[str]]:
    """Admission notes and codes of the other hospitals: what a baseline may learn from to have seen the labels the base saw."""
    from helpers import notes

    rows = synthetic.draw(count, seed)
    texts = [notes.admission_note(text) for text in synthetic.summaries(rows, seed)]
    kept = [
        (text, icd.normalise(row["code"])) for text, row in zip(texts, rows, strict=True) if text
    ]
    return [text for text, _ in kept], [str(code) for _, code in kept]


def train_tokenizer(out: Path, corpus: list[str]):
    """Byte-level BPE with Qwen2's pre-tokenizer and Qwen2.5's chat layout. The answer tags are plain text, not special tokens:
    trainers decode with skip_special_tokens=True, and special tags would vanish before a reward sees them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(RECIPE["pre_tokenizer"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words of the prompt and of the answers become tokens, as in any chat model's tokenizer; as words, in no format.
    words = prompts.SYSTEM + "\nsystem\nuser\nassistant\nFindings Detail none think diagnosis\n"
    words += "".join(f"\n{icd.chapter_short(n)}" for n in range(1, 23))
    tokenizer.train_from_iterator([*corpus, *[words] * 400], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    fast = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        pad_token=special[0],
        eos_token=special[2],
        unk_token=None,
    )
    fast.add_special_tokens({"additional_special_tokens": special[1:2]})
    fast.chat_template = RECIPE["chat_template"]
    fast.model_max_length = CONFIG["max_position_embeddings"]
    fast.save_pretrained(str(out))
    return fast


def perplexity(model, tokenizer, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood per token over documents, each scored alone."""
    import torch

    total, tokens = 0.0, 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:768]], device=model.device)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def held_out() -> list[str]:
    """200 documents that pre-training never saw."""
    return list(documents(200, HELD_OUT_SEED))


def fingerprint() -> str:
    """Hash of what the generator writes (the held-out documents): it changes with the casebook and the generator's behaviour."""
    return hashlib.sha256("\x00".join(held_out()).encode()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    threads: int = 2,
    batch_tokens: int = 4096,
    go_on_from: Path | None = None,
) -> None:
    """Train tokenizer and model over so many batches of documents; write weights (bf16), log and manifest.

    Documents of the early mix for the first EARLY of the steps. Texts end with either of the two tokens that can end one.
    go_on_from: a finished base, whose training goes on at a quarter of the rate, with the same tokenizer and new documents.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from helpers import models

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    models.keep_memory()
    out.mkdir(parents=True, exist_ok=True)
    before: list[dict] = []
    if go_on_from is None:
        corpus = [
            *documents(3000, HOSPITAL_SEED - 1, early=True),
            *documents(3000, HOSPITAL_SEED - 2),
        ]
        tokenizer = train_tokenizer(out, corpus)
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        model = Qwen2ForCausalLM(
            Qwen2Config(**CONFIG, bos_token_id=None, eos_token_id=end, pad_token_id=end)
        )
        command = f"--steps {steps} --seed {seed}"
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(go_on_from))
        tokenizer.save_pretrained(str(out))
        model = Qwen2ForCausalLM.from_pretrained(str(go_on_from), dtype=torch.float32)
        earlier = json.loads((go_on_from / "manifest.json").read_text())["command"].partition(
            "build "
        )[2]
        command = f"{earlier}, then --go-on-from it --steps {steps} --seed {seed}"
        with (go_on_from / "training_log.csv").open() as handle:
            before = list(csv.DictReader(handle))
    model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at these lengths
    log = train(
        model,
        tokenizer,
        steps,
        seed,
        RATE if go_on_from is None else RATE / 4,
        batch_tokens,
        out,
        before,
    )
    save(model, tokenizer, out)
    _write_log(out, log)
    files = [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "training_log.csv",
    ]
    manifest = {
        "command": f"python -m helpers.tiny_base.build {command}",
        "held_out_perplexity": round(perplexity(model.float(), tokenizer, held_out()), 3),
        "minutes": log[-1]["minutes"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": log[-1]["tokens"],
        "documents": log[-1]["documents"],
        "first_hospital_seed": HOSPITAL_SEED,
        "casebook_sha256": synthetic.casebook().sha256,
        "generator_sha256": fingerprint(),
        "files": {name: sha256(out / name) for name in files if (out / name).is_file()},
        "torch": torch.__version__.split("+")[0],
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps(manifest, indent=1))


def save(model, tokenizer, out: Path) -> None:
    """Write the weights in bf16, with both tokens that can end a text: chats end turns with <|im_end|>, documents with
    <|endoftext|>, and generation stops at either."""
    import torch

    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        [tokenizer.eos_token_id, end],
        end,
    )
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, end
    model.save_pretrained(str(out), safe_serialization=True)


def _write_log(out: Path, log: list[dict]) -> None:
    with (out / "training_log.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(log[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def named_right(model, tokenizer, count: int = 64) -> float:
    """Share of unseen admission notes after which the model, asked as a conference would be, names the right code."""
    import torch

    from helpers import notes

    rows = synthetic.draw(count, HELD_OUT_SEED + 1)
    right = 0
    model.eval()
    for row, text in zip(rows, synthetic.summaries(rows, HELD_OUT_SEED + 1), strict=True):
        prompt = f"{notes.admission_note(text)}\n\nFinal diagnosis"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        with torch.no_grad():
            told = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
            )
        right += row["code"] in tokenizer.decode(told[0, ids.shape[1] :])
    model.train()
    return right / count


def train(
    model,
    tokenizer,
    steps: int,
    seed: int,
    lr: float,
    batch_tokens: int,
    out: Path,
    before: Sequence[dict] = (),
    source: Callable[..., Iterable[str]] = documents,
) -> list[dict]:
    """AdamW on documents of ever new hospitals, on the model's device; the rate is constant for 40 % of the steps, then falls.

    Returns the log, which goes on from `before`, the log of an earlier training. `source` stands in for `documents`.
    """
    import torch

    rng = np.random.default_rng([seed, 7])
    ends = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.eos_token_id]
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    last = before[-1] if before else {"step": 0, "minutes": 0, "tokens": 0, "documents": 0}
    seen, document_count, losses, log = int(last["tokens"]), int(last["documents"]), [], [*before]
    started, hospital = (
        time.time() - 60 * float(last["minutes"]),
        HOSPITAL_SEED + document_count // 4000,
    )
    queue: list[list[list[int]]] = []
    model.train()
    for step in range(steps):
        if not queue:  # the next hospital: documents of like length go into one batch
            texts = list(source(4000, hospital, early=not before and step < EARLY * steps))
            hospital, document_count = hospital + 1, document_count + len(texts)
            encoded = sorted(
                ([*ids[:767], int(rng.choice(ends))] for ids in tokenizer(texts)["input_ids"]),
                key=len,
            )
            batch: list[list[int]] = []
            for ids in encoded:
                if batch and len(ids) * (len(batch) + 1) > batch_tokens:
                    queue.append(batch)
                    batch = []
                batch.append(ids)
            queue.append(batch)
            rng.shuffle(queue)
        batch = queue.pop()
        width = max(map(len, batch))
        ids = torch.tensor(
            [row + [ends[0]] * (width - len(row)) for row in batch], device=model.device
        )
        labels = torch.tensor(
            [row + [-100] * (width - len(row)) for row in batch], device=model.device
        )
        for group in optimizer.param_groups:
            falling = 1.0 if step < 0.4 * steps else max(0.02, (1 - step / steps) / 0.6)
            group["lr"] = lr * min(1.0, (step + 1) / 100) * falling
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((labels >= 0).sum())
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            minutes = round((time.time() - started) / 60, 2)
            log.append(
                {
                    "step": int(last["step"]) + step + 1,
                    "minutes": minutes,
                    "tokens": seen,
                    "documents": document_count,
                    "loss": round(float(np.mean(losses[-50:])), 4),
                    "named_right": "",
                }
            )
            if (step + 1) % 500 == 0 or step + 1 == steps:
                log[-1]["named_right"] = round(named_right(model, tokenizer), 3)
                _write_log(out, log)
            print(log[-1], flush=True)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the tiny base from nothing.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of about 4,096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--go-on-from", type=Path, help="a finished base, to train it further")
    args = parser.parse_args()
    build(
        args.out, steps=args.steps, seed=args.seed, threads=args.threads, go_on_from=args.go_on_from
    )


if __name__ == "__main__":
    main()
