"""Rebuild the tiny Qwen2 base from nothing: tokenizer, corpus, pre-training, manifest.

`make tiny-base`, or `python -m tools.tiny_base`. The base stands in for the Qwen2.5-Instruct that
other profiles download: it knows the language of the synthetic hospital before it is adapted. Its
corpus is plain text: textbook-like prose made from the casebook and ICD-10-CM titles, and whole
discharge summaries of patients of *other* hospitals (seeds from HOSPITAL_SEED on; the course's own
are 0 to 99). It never holds the answer format, nor a patient of the course. What it saw of labels:
every document names the diagnosis of its patient, most with the code. Notebook 5 gives
the same labels to a baseline (`labelled_notes`).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from helpers import casebook, hospital, icd, prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUT = Path(__file__).parents[1] / "helpers" / "tiny_base"
COMMAND = "python -m tools.tiny_base"
HOSPITAL_SEED = 1000  # the course's hospitals have seeds below
HELD_OUT_SEED = 900
STEPS = 5000
RATE = 2e-3  # of learning, at the top
EARLY = 0.2  # of the steps
VOCABULARY = 2560
LONGEST = 768  # tokens of a document that are read
DOCUMENTS = 4000  # of each hospital
RECIPE = yaml.safe_load(Path(__file__).with_name("tiny_base_recipe.yaml").read_text("utf-8"))
CONFIG = {"vocab_size": VOCABULARY} | RECIPE["config"]
KINDS = RECIPE["kinds"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FILES = (
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "training_log.csv",
)

Source = Callable[..., Iterable[str]]


# --- corpus -------------------------------------------------------------------------------------


def documents(count: int, seed: int, *, early: bool = False) -> Iterator[str]:
    """`count` documents of the corpus, about the patients of the hospital with this seed.

    Textbook vignettes, whole discharge summaries, admission notes with what a case conference said
    of them (which quotes from the note), marked-up records, pages of an index. `early`: mostly
    vignettes, which are short and name their diagnosis at once. A token that a base never saw has
    an embedding that no adapter above it can tell from others of its kind: so the corpus has the
    words of the prompt and of the answers, though never in the answer format.
    """
    rng = np.random.default_rng([seed, 7])
    rows = hospital.draw(count, seed)
    shares = [share[0 if early else 1] for share in KINDS.values()]
    kinds = rng.choice(list(KINDS), size=count, p=shares)
    whole = np.isin(kinds, ["summary", "conference"])
    summaries = iter(hospital.summaries(list(itertools.compress(rows, whole)), seed))
    for row, kind in zip(rows, kinds, strict=True):
        names = _names(row)
        if kind == "summary":
            yield _summary(next(summaries), names, rng)
        elif kind == "conference":
            yield _conference(next(summaries), names, rng)
        elif kind == "vignette":
            yield _vignette(row, names, rng)
        elif kind == "record":
            yield _record(row, names, rng)
        else:
            yield _index(rng)


def held_out() -> list[str]:
    """200 documents that pre-training never saw."""
    return list(documents(200, HELD_OUT_SEED))


def fingerprint() -> str:
    """Hash of the held-out documents: it changes with the casebook and with what writes them."""
    return hashlib.sha256("\x00".join(held_out()).encode()).hexdigest()


def _names(row: dict[str, Any]) -> dict[str, str]:
    """How the templates of the recipe name a patient and the diagnosis."""
    code = row["code"]
    category = icd.category(code)
    return {
        "who": "a man" if row["sex"] == "M" else "a woman",
        "title": icd.title(code),
        "code": code,
        "cat": category,
        "category": icd.title(category),
        "chapter": icd.chapter_short(icd.chapter(code)),
    }


def _template(kind: str, rng: np.random.Generator) -> str:
    return str(rng.choice(RECIPE[kind]))


def _summary(summary: str, names: dict[str, str], rng: np.random.Generator) -> str:
    """A discharge summary, in seven of ten cases with the code behind the diagnosis."""
    if rng.random() < 0.7:
        title = names["title"]
        summary = summary.replace(f"\n{title}\n", f"\n{title} ({names['code']})\n")
    return summary.strip()


def _conference(summary: str, names: dict[str, str], rng: np.random.Generator) -> str:
    """An admission note, and a paragraph that quotes what speaks most for the diagnosis."""
    from helpers import notes

    note = notes.admission_note(summary)
    if not note:
        return summary.strip()
    mentions = [mention for mention in casebook.read_findings(note) if mention.present]
    spans = {m.finding: note[m.start : m.end] for m in reversed(mentions)}  # the first one counts
    findings, detail = casebook.evidence(names["code"], spans, int(rng.integers(2, 5)))
    key = "; ".join(spans[name] for name in findings) or "nothing specific"
    words = {"Chapter": names["chapter"], "key": key, "detail": spans.get(detail, "none")}
    return f"{note}\n\n{_template('conference', rng).format(**names, **words)}"


def _phrases(row: dict[str, Any], rng: np.random.Generator) -> dict[str, str]:
    """Finding that the patient has -> one way to say it."""
    findings = casebook.casebook().findings
    return {name: str(rng.choice(findings[name]["phrases"])) for name in row["drawn"]}


def _vignette(row: dict[str, Any], names: dict[str, str], rng: np.random.Generator) -> str:
    """Textbook prose: up to seven typical findings of the patient, and the diagnosis."""
    phrases = _phrases(row, rng)
    typical = casebook.casebook().entries[row["code"]]["findings"]
    own = [name for name in row["drawn"] if name in typical] or row["drawn"][:3]
    symptoms = [phrases[own[i]] for i in rng.permutation(len(own))][:7] or ["no complaint"]
    text = _template("vignettes", rng).format(**names, f=", ".join(symptoms))
    return text[0].upper() + text[1:]


def _record(row: dict[str, Any], names: dict[str, str], rng: np.random.Generator) -> str:
    """A marked-up record: some of the fields sex, complaint and sections of the note."""
    phrases = _phrases(row, rng)
    findings = casebook.casebook().findings
    fields = {"sex": row["sex"], "complaint": row["complaint"] or "none"}
    for section in casebook.SECTIONS:
        there = [phrases[name] for name in row["drawn"] if findings[name]["section"] == section]
        fields[section] = "; ".join(there) or "none"
    # With <hpi> alone, `<` would always be part of a longer token.
    if rng.random() < 0.5:
        fields = {name.capitalize(): text for name, text in fields.items()}
    elements = [f"<{name}>{text}</{name}>" for name, text in fields.items() if rng.random() < 0.6]
    return _template("record", rng).format(**names, fields="\n".join(elements))


def _index(rng: np.random.Generator) -> str:
    """A page of an index: categories of the casebook by chapter; or a few lines of a glossary."""
    if rng.random() < 0.35:
        glossary = RECIPE["glossary"]
        return "\n".join(glossary[i] for i in rng.permutation(len(glossary))[:5])
    by_chapter: dict[str, list[str]] = {}
    for category in sorted({icd.category(code) for code in casebook.casebook().codes}):
        chapter = icd.chapter_short(icd.chapter(category))
        by_chapter.setdefault(chapter, []).append(category)
    lines = []
    for chapter in rng.permutation(list(by_chapter))[:6]:
        some = rng.permutation(by_chapter[chapter])[:3]
        lines.append(f"{chapter}: " + ", ".join(f"{code} {icd.title(code)}" for code in some))
    return "\n".join(lines)


# --- tokenizer and model ------------------------------------------------------------------------


def train_tokenizer(out: Path, corpus: list[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen2's pre-tokenizer and Qwen2.5's chat layout, saved to `out`.

    The answer tags are plain text, not special tokens: trainers decode with
    skip_special_tokens=True, and special tags would vanish before a reward sees them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(RECIPE["pre_tokenizer"]), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words of the prompt and of the answers become tokens, as in any chat model's tokenizer; as
    # words, in no format.
    words = prompts.SYSTEM + "\nsystem\nuser\nassistant\nFindings Detail none think diagnosis\n"
    words += "".join(f"\n{icd.chapter_short(number)}" for number in range(1, 23))
    tokenizer.train_from_iterator([*corpus, *[words] * 400], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    end, turn, end_of_turn = SPECIAL
    fast = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        pad_token=end,
        eos_token=end_of_turn,
        unk_token=None,
    )
    fast.add_special_tokens({"additional_special_tokens": [turn]})
    fast.chat_template = RECIPE["chat_template"]
    fast.model_max_length = CONFIG["max_position_embeddings"]
    fast.save_pretrained(str(out))
    return fast


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the weights in bf16, with both tokens that can end a text.

    Chats end turns with <|im_end|>, documents with <|endoftext|>, and generation stops at either.
    """
    import torch

    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.generation_config.pad_token_id = end
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = end
    model.save_pretrained(str(out), safe_serialization=True)


# --- measures -----------------------------------------------------------------------------------


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> float:
    """exp of the mean negative log-likelihood per token over documents, each scored alone."""
    import torch

    total = 0.0
    tokens = 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:LONGEST]], device=model.device)
        predictions = ids.shape[1] - 1
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * predictions
        tokens += predictions
    return math.exp(total / tokens)


def named_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 64
) -> float:
    """Share of unseen admission notes of which the model, asked like a conference, names the
    code."""
    import torch

    from helpers import notes

    rows = hospital.draw(count, HELD_OUT_SEED + 1)
    summaries = hospital.summaries(rows, HELD_OUT_SEED + 1)
    right = 0
    model.eval()
    for row, summary in zip(rows, summaries, strict=True):
        prompt = f"{notes.admission_note(summary)}\n\nFinal diagnosis"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        with torch.no_grad():
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
            )
        right += row["code"] in tokenizer.decode(answer[0, ids.shape[1] :])
    model.train()
    return right / count


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- training -----------------------------------------------------------------------------------


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    lr: float,
    batch_tokens: int,
    out: Path,
    before: Sequence[dict[str, Any]] = (),
    source: Source = documents,
) -> list[dict[str, Any]]:
    """AdamW on documents of ever new hospitals, on the model's device.

    Returns the log, a row for 50 steps, which goes on from `before`, the log of an earlier
    training. `source` stands in for `documents`.
    """
    optimizer = _optimizer(model, lr)
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    last = before[-1] if before else {"step": 0, "minutes": 0, "tokens": 0, "documents": 0}
    early_steps = 0 if before else EARLY * steps
    batches = _batches(tokenizer, seed, last["documents"], early_steps, batch_tokens, source)
    started = time.time() - 60 * last["minutes"]
    tokens = last["tokens"]
    losses: list[float] = []
    log = [*before]
    model.train()
    for step, (batch, count) in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        losses.append(_learn(model, optimizer, batch, pad))
        tokens += sum(map(len, batch))
        done = step + 1
        if done % 50:
            continue
        row = {
            "step": last["step"] + done,
            "minutes": round((time.time() - started) / 60, 2),
            "tokens": tokens,
            "documents": count,
            "loss": round(float(np.mean(losses[-50:])), 4),
            "named_right": None,
        }
        log.append(row)
        if done % 500 == 0 or done == steps:
            row["named_right"] = round(named_right(model, tokenizer), 3)
            _write_log(out, log)
        print(row, flush=True)
    return log


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 100 steps of warm-up, constant up to 40 % of the steps, then
    down."""
    falling = 1.0 if step < 0.4 * steps else max(0.02, (1 - step / steps) / 0.6)
    return min(1.0, (step + 1) / 100) * falling


def _optimizer(model: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    count: int,
    early_steps: float,
    batch_tokens: int,
    source: Source,
) -> Iterator[tuple[list[list[int]], int]]:
    """Batches of token ids without end, and how many documents have been read with each.

    `count`: documents read before. Documents of like length go into one batch. Texts end with
    either of the two tokens that can end one.
    """
    rng = np.random.default_rng([seed, 7])
    ends = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.eos_token_id]
    step = 0
    for number in itertools.count(HOSPITAL_SEED + count // DOCUMENTS):
        texts = list(source(DOCUMENTS, number, early=step < early_steps))
        count += len(texts)
        sequences = []
        for ids in tokenizer(texts)["input_ids"]:
            sequences.append([*ids[: LONGEST - 1], int(rng.choice(ends))])
        queue = _packed(sorted(sequences, key=len), batch_tokens)
        rng.shuffle(queue)
        while queue:
            yield queue.pop(), count
            step += 1


def _packed(sequences: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Batches of texts, from short to long, of at most so many tokens with their padding."""
    batches: list[list[list[int]]] = [[]]
    for ids in sequences:
        if batches[-1] and len(ids) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(ids)
    return batches


def _learn(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: list[list[int]], pad: int
) -> float:
    """One step on a batch; returns its loss."""
    import torch

    width = max(map(len, batch))
    inputs = [row + [pad] * (width - len(row)) for row in batch]
    targets = [row + [-100] * (width - len(row)) for row in batch]
    ids = torch.tensor(inputs, device=model.device)
    labels = torch.tensor(targets, device=model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _write_log(out: Path, log: list[dict[str, Any]]) -> None:
    pd.DataFrame(log).to_csv(out / "training_log.csv", index=False, lineterminator="\n")


# --- the whole ----------------------------------------------------------------------------------


def build(
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    threads: int = 2,
    batch_tokens: int = 4096,
    go_on_from: Path | None = None,
) -> None:
    """Train tokenizer and model over so many batches of documents; write weights, log, manifest.

    Documents of the early mix for the first EARLY of the steps. go_on_from: a finished base, whose
    training goes on at a quarter of the rate, with the same tokenizer and new documents.
    """
    import torch

    from helpers.machinery import cpu

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    cpu.keep_memory()
    out.mkdir(parents=True, exist_ok=True)
    command = f"{COMMAND} --steps {steps} --seed {seed}"
    before: list[dict[str, Any]] = []
    rate = RATE
    if go_on_from is None:
        model, tokenizer = _new(out)
    else:
        model, tokenizer = _finished(go_on_from, out)
        earlier = json.loads((go_on_from / "manifest.json").read_text())["command"]
        command = f"{earlier}, then --go-on-from it --steps {steps} --seed {seed}"
        before = pd.read_csv(go_on_from / "training_log.csv").to_dict("records")
        rate = RATE / 4
    model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at these lengths
    log = train(model, tokenizer, steps, seed, rate, batch_tokens, out, before)
    save(model, tokenizer, out)
    _write_log(out, log)
    manifest = {
        "command": command,
        "held_out_perplexity": round(perplexity(model.float(), tokenizer, held_out()), 3),
        "minutes": log[-1]["minutes"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": log[-1]["tokens"],
        "documents": log[-1]["documents"],
        "first_hospital_seed": HOSPITAL_SEED,
        "casebook_sha256": casebook.casebook().sha256,
        "generator_sha256": fingerprint(),
        "files": {name: sha256(out / name) for name in FILES if (out / name).is_file()},
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps(manifest, indent=1)
    (out / "manifest.json").write_text(text + "\n")
    print(text)


def _new(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that knows nothing, and a tokenizer trained on two small corpora, saved to `out`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    corpus = [*documents(3000, HOSPITAL_SEED - 1, early=True)]
    corpus += documents(3000, HOSPITAL_SEED - 2)
    tokenizer = train_tokenizer(out, corpus)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = Qwen2Config(**CONFIG, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    return Qwen2ForCausalLM(config), tokenizer


def _finished(folder: Path, out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a finished base, and its tokenizer, which is copied to `out`."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(str(out))
    return Qwen2ForCausalLM.from_pretrained(str(folder), dtype=torch.float32), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the tiny base from nothing.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of about 4,096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--go-on-from", type=Path, help="a finished base, to train it further")
    options = vars(parser.parse_args())
    build(options.pop("out"), **options)


if __name__ == "__main__":
    main()
