"""Whether a base reads well enough for notes that must be read: the bars of results/LOG.md.

`python -m tools.reading_bars --labels 1888 --form reasons`. SFT as in notebook 3 on a hospital with
reading 1, then the answers to its validation notes beside TF-IDF with logistic regression on the
same labels. A row for each run goes to results/reading_bars.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import (
    grounding,
    hospital,
    inference,
    metrics,
    mimic,
    models,
    profiles,
    prompts,
    traces,
    training,
)
from helpers.machinery import cpu, places
from helpers.study.run import CODE_ALONE
from tools.reading_base import quotes

RESULTS = places.results_dir() / "reading_bars.csv"
SEED = 0
LEVELS = ("full", "category", "chapter")
FORMS = ("reasons", "list", "codes")


def cases_of(folder: Path, admissions: int, reading: float) -> pd.DataFrame:
    """The cases of the hospital with this reading, which is written where it is missing."""
    if not folder.exists():
        hospital.write(folder, admissions=admissions, seed=SEED, reading=reading)
    return mimic.build_cases(folder, seed=SEED)


def lessons(
    cases: pd.DataFrame, form: str, reading: float, misread: float, told: bool
) -> pd.DataFrame:
    """What SFT is taught about cases: the table of traces.

    form: reasons, the template of the course; list, the template with everything that the note
    states of the patient now instead of the findings that speak for the code; codes, no reasons.
    told: the gold code takes the place of the teacher's.
    """
    table = traces.from_template(cases, habit=0.0, reading=reading, misread=misread)
    gold = cases["code"].to_numpy()
    rows = []
    for note, trace, code in zip(cases["note"], table.itertuples(), gold, strict=True):
        think = trace.think
        if form == "codes":
            think = CODE_ALONE  # as in the study
        elif form == "list":
            present = "; ".join(quote.words for quote in quotes(note) if quote.state == "")
            category = trace.think.split("\n")[1]
            think = f"Findings: {present or traces.NOTHING}.\n{category}"
        rows.append((trace.hadm_id, think, code if told else trace.code, note))
    return traces.checked(rows)


def fit(cases: pd.DataFrame, table: pd.DataFrame, profile: Any, out: Path) -> tuple[Any, Any]:
    """Model with an adapter after SFT, and its tokenizer."""
    from peft import LoraConfig
    from transformers.trainer_utils import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(SEED)
    model, tokenizer = models.load(profile)
    length = profile.max_prompt_tokens + profile.max_new_tokens
    arguments = profile.sft | {"logging_steps": 1, "max_length": length}
    arguments["train_sampling_strategy"] = "group_by_length"
    config = training.defaults(models.dtype_for_device(), **arguments)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**config, output_dir=str(out), seed=SEED),
        processing_class=tokenizer,
        train_dataset=traces.sft_dataset(cases, table, tokenizer, profile.max_note_tokens),
        peft_config=LoraConfig(**profile.lora, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[training.Steps("SFT")],
    )
    training.run(trainer, out, "sft")
    training.save(trainer, out)
    return trainer.model, tokenizer


def shares(predicted: pd.Series, cases: pd.DataFrame) -> dict[str, float]:
    """Accuracy at each level."""
    report = metrics.report(cases["code"], predicted, n_boot=0)
    return {level: report[level]["accuracy"] for level in LEVELS}


def read_well(think: str, note: str) -> tuple[int, int, int]:
    """(findings cited, those that stand in the note, those that are the patient's own and present)
    of a reasoning."""
    cited = traces.cited_findings(think)
    own = {quote.words for quote in quotes(note) if quote.state == ""}
    return len(cited), sum(item in note for item in cited), sum(item in own for item in cited)


def count_words(train: pd.DataFrame, test: pd.DataFrame) -> pd.Series:
    """Codes of the test notes by TF-IDF (words and pairs) and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectors = words.fit_transform(train["note"])
    regression = LogisticRegression(C=30, max_iter=300).fit(vectors, train["code"])
    return pd.Series(regression.predict(words.transform(test["note"])), index=test.index)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: what was trained, and how it answers the validation notes."""
    cpu.keep_memory()
    folder = arguments.hospital or Path(f"build/hospital2-{SEED}-reading-{arguments.reading}")
    cases = cases_of(folder, arguments.admissions, arguments.reading)
    train = cases[cases["split"] == "train"]
    if arguments.labels < len(train):
        train = train.sample(arguments.labels, random_state=SEED)
    val = cases[cases["split"] == "val"].head(arguments.cases)
    profile = profiles.get("tiny").replace(
        base=str(arguments.base),
        max_note_tokens=340,
        max_prompt_tokens=460,
        max_new_tokens=arguments.room,
        lora={"r": arguments.rank, "lora_alpha": 2 * arguments.rank},
        sft={"max_steps": arguments.steps, "learning_rate": arguments.lr},
    )
    table = lessons(train, arguments.form, arguments.reading, arguments.misread, arguments.told)
    began = time.time()
    name = f"{arguments.form}-{arguments.labels}-{arguments.steps}-{arguments.rank}"
    out = places.run_dir().parent / "reading-bars" / f"{name}-{int(began)}"
    model, tokenizer = fit(train, table, profile, out)
    trained = time.time()
    greedy = inference.predict(model, tokenizer, val, profile)
    some = val.head(200)
    sampled = inference.predict(model, tokenizer, some, profile, temperature=1.0, seed=SEED)
    greedy.to_parquet(out / "greedy.parquet")
    thinks = [prompts.parse(text).think or "" for text in greedy["completion"]]
    pairs = list(zip(thinks, val["note"], strict=True))
    read = [read_well(think, note) for think, note in pairs]
    grounded = sum(grounding.score(think, note) for think, note in pairs)
    cited, copied, own = (sum(column) for column in zip(*read, strict=True))
    words = {f"tfidf_{key}": value for key, value in shares(count_words(train, val), val).items()}
    taught = (table["code"].to_numpy() == train["code"].to_numpy()).mean()
    row = {
        **{key: getattr(arguments, key) for key in ("form", "labels", "steps", "rank", "lr")},
        "reading": arguments.reading,
        "misread": arguments.misread,
        "told": arguments.told,
        "taught_right": taught,
        **shares(greedy["predicted"], val),
        **words,
        "usable": greedy["predicted"].notna().mean(),
        "usable_sampled": sampled["predicted"].notna().mean(),
        "copied": copied / max(1, cited),
        "own": own / max(1, cited),
        "cited": cited / len(val),
        "grounding": grounded / len(val),
        "notes": len(val),
        "train_minutes": round((trained - began) / 60, 1),
        "base": arguments.mark,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("build/reading-base"))
    parser.add_argument("--mark", default="", help="what the base is called in the table")
    parser.add_argument("--reading", type=float, default=1.0)
    parser.add_argument("--hospital", type=Path, help="a folder; written where it is missing")
    parser.add_argument("--admissions", type=int, default=6000)
    parser.add_argument("--labels", type=int, default=1888, help="training notes with a code")
    parser.add_argument("--cases", type=int, default=539, help="validation notes")
    parser.add_argument("--form", choices=FORMS, default="reasons")
    parser.add_argument("--misread", type=float, default=traces.MISREAD)
    parser.add_argument("--told", action="store_true", help="the gold code, not the teacher's")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--room", type=int, default=128, help="tokens of a completion")
    row = pd.DataFrame([measure(parser.parse_args())]).round(3)
    print(row.T.to_string())
    before = [pd.read_csv(RESULTS)] if RESULTS.exists() else []
    places.write(RESULTS, pd.concat([*before, row], ignore_index=True).to_csv(index=False))


if __name__ == "__main__":
    main()
