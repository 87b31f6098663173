"""Batched generation: cases in, the table of predictions out; free, sampled, or constrained to valid codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers import course, fit, icd, prompts

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("subject_id", "hadm_id", "sample", "completion", "think", "predicted")


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: pd.DataFrame,
    *,
    max_new_tokens: int = 80,
    max_note_tokens: int | None = None,
    batch_size: int = 128,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    valid_codes: Iterable[str] | None = None,
    dictionary: Iterable[str] | None = None,
    to_messages: Callable[[str], list[dict[str, str]]] = prompts.messages,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    keep: Path | None = None,
) -> pd.DataFrame:
    """Answers of a model for cases (columns subject_id, hadm_id, note), one row per case and sample, in the order of cases.

    Greedy at temperature 0, else `samples` draws per case, the same for the same `seed` whatever ran before. A model's own
    habits of generation (a repetition penalty, banned words), which many come with, are set aside. `predicted` is the
    normalised code, null where the answer is unusable: no code, or one that is neither in ICD-10-CM nor in `dictionary`
    (MIMIC's own). valid_codes: decode under a trie of these, from `<diagnosis>` on. Cases are sorted by length, so that a
    batch wastes little padding; `progress` wraps the list of batch starts (course.progress). keep: a folder for finished
    batches; the same call with the same folder goes on after them. Research use only: no answer is a diagnosis. Raises
    ValueError for bad sizes, and for prompts that the model's context or embeddings do not hold, MemoryError that says what
    to lower.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    from helpers.models import truncate_note

    if batch_size < 1 or samples < 1 or (samples > 1 and temperature <= 0):
        raise ValueError(
            "predict: batch_size and samples must be >= 1, and several samples need a temperature above 0."
        )
    was_training, side, habits = (
        model.training,
        tokenizer.padding_side,
        getattr(model, "generation_config", None),
    )
    known = {code for code in map(icd.normalise, dictionary or ()) if code}
    texts, openings = [], []
    for note in cases["note"]:
        turns = to_messages(
            truncate_note(note, tokenizer, max_note_tokens) if max_note_tokens else note
        )
        texts.append(prompts.chat(tokenizer, turns))
        openings.append(
            turns[-1]["content"].rpartition("<think>")[2].lstrip()
            if turns[-1]["role"] == "assistant"
            else ""
        )
    order = sorted(
        range(len(texts)), key=lambda i: len(texts[i]), reverse=True
    )  # longest first: memory trouble shows at once
    rows: list[dict[str, Any] | None] = [None] * (len(texts) * samples)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    processors = LogitsProcessorList(
        [code_trie(tokenizer, valid_codes, 0)] if valid_codes is not None else []
    )
    if (
        habits is not None
    ):  # what a model comes with beside the tokens that end and fill: penalties, banned words, assistants
        model.generation_config = GenerationConfig(
            bos_token_id=habits.bos_token_id,
            pad_token_id=habits.pad_token_id,
            eos_token_id=prompts.ends(tokenizer, habits.eos_token_id),
        )
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for start in progress(range(0, len(order), batch_size)):
            chosen, width = order[start : start + batch_size], "many"
            part = keep and keep / f"{start}.json"
            kept = course.read(part).get("rows", []) if part else []
            if [row["hadm_id"] for row in kept] == [
                int(cases["hadm_id"].iloc[i]) for i in chosen for _ in range(samples)
            ]:
                for j, row in enumerate(kept):
                    rows[chosen[j // samples] * samples + j % samples] = row
                continue
            if seed is not None:
                torch.manual_seed(
                    seed + start
                )  # of each batch, so that it does not matter which were kept
            batch = tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            batch = batch.to(model.device)
            width = batch["input_ids"].shape[1]
            _check_limits(model, int(batch["input_ids"].max()), width, max_new_tokens)
            for trie in processors:
                trie.start, trie.openings = (
                    width,
                    [openings[i] for i in chosen for _ in range(samples)],
                )
            with torch.no_grad():
                out = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    num_return_sequences=samples,
                    logits_processor=processors,
                    pad_token_id=tokenizer.pad_token_id,
                    **sampling,
                )
            for j, completion in enumerate(
                tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            ):
                i, sample = chosen[j // samples], j % samples
                completion = openings[i] + completion
                parsed = prompts.parse(completion)
                case = cases.iloc[i]
                usable = parsed.code is not None and (
                    parsed.code in known or icd.is_valid(parsed.code)
                )
                rows[i * samples + sample] = {
                    "subject_id": int(case["subject_id"]),
                    "hadm_id": int(case["hadm_id"]),
                    "sample": sample,
                    "completion": completion,
                    "think": parsed.think,
                    "predicted": parsed.code if usable else None,
                }
            if part:
                course.write(
                    part,
                    {
                        "rows": [
                            rows[i * samples + sample] for i in chosen for sample in range(samples)
                        ]
                    },
                )
    except (RuntimeError, MemoryError) as error:
        if not fit.out_of_memory(error):
            raise
        lower = (
            f"batch_size to {len(chosen) // 2} (infer_batch_tokens of the profile to half)"
            if len(chosen) > 1
            else "max_note_tokens or max_new_tokens lower, or load the model with four_bit=True"
        )
        raise MemoryError(
            f"{len(chosen)} prompts of {width} tokens with {samples} answers each do not fit: set {lower}. "
            "What was answered before is kept where `keep` names a folder."
        ) from error
    finally:
        tokenizer.padding_side = side
        if habits is not None:
            model.generation_config = habits
        model.train(was_training)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _check_limits(model: Any, largest: int, width: int, new: int) -> None:
    config = getattr(model, "config", None)
    context = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    if context and width + new > context:
        raise ValueError(
            f"predict: a prompt of {width} tokens and {new} of an answer do not go into the model's context of "
            f"{context}: set max_note_tokens or max_new_tokens lower."
        )
    if config and largest >= (size := model.get_input_embeddings().num_embeddings):
        raise ValueError(
            f"predict: token {largest} has no embedding, there are {size}: this tokenizer is not the model's."
        )


def code_trie(
    tokenizer: PreTrainedTokenizerBase, codes: Iterable[str], prompt_width: int
) -> LogitsProcessor:
    """A LogitsProcessor that lets only `codes` (dotted), then `</diagnosis>`, follow a `<diagnosis>` in the completion.

    Building it decodes the vocabulary once: `start`, at first `prompt_width`, is where completions begin, set for each batch.
    The trie is over characters of the decoded text, not over tokens, so it holds for any way to split a code into tokens.
    `openings`, set with it, are texts that completions go on from (a last turn of the assistant).
    For evaluation only: a reward under constraint would teach nothing about format.
    """
    import torch
    from transformers import LogitsProcessor

    close = "</diagnosis>"
    allowed = sorted({icd.dotted(code) + close for code in codes})
    prefixes = {text[:n] for text in allowed for n in range(len(text) + 1)}
    following: dict[str, set[str]] = {}
    for text in prefixes - {""}:
        following.setdefault(text[:-1], set()).add(text[-1])
    first = tokenizer(">", add_special_tokens=False)["input_ids"][
        -1:
    ]  # at the start of a text, some decoders drop a blank
    pieces = [
        tokenizer.decode([*first, i])[len(tokenizer.decode(first)) :] for i in range(len(tokenizer))
    ]
    by_first: dict[str, list[int]] = {}
    for i in sorted(set(range(len(pieces))) - set(tokenizer.all_special_ids)):
        by_first.setdefault(pieces[i][:1], []).append(i)

    @cache
    def after(text: str) -> torch.Tensor:
        ids = [
            i
            for ch in following.get(text, ())
            for i in by_first.get(ch, ())
            if text + pieces[i] in prefixes
        ]
        return torch.tensor(ids, dtype=torch.long)

    class CodeTrie(LogitsProcessor):
        start, openings = prompt_width, None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for row, text in enumerate(tokenizer.batch_decode(input_ids[:, self.start :])):
                head, tag, tail = ((self.openings[row] if self.openings else "") + text).rpartition(
                    "<diagnosis>"
                )
                tail = tail.lstrip()
                if tag and tail in prefixes and not tail.endswith(close):
                    keep = after(tail).to(scores.device)
                    if len(keep):
                        scores[row] = torch.full_like(scores[row], -torch.inf).index_copy_(
                            0, keep, scores[row, keep]
                        )
            return scores

    return CodeTrie()
