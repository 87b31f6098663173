"""Batched generation: cases in, the table of predictions out; free, sampled, or constrained to
valid codes.

Taught in notebook 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers import icd, profiles, prompts
from helpers.machinery import memory, places

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_CODE = 64  # tokens: more than a code between its tags takes, letter by letter
COLUMNS = ("subject_id", "hadm_id", "sample", "completion", "think", "predicted")


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: pd.DataFrame,
    profile: profiles.Profile | None = None,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    valid_codes: Iterable[str] | None = None,
    dictionary: Iterable[str] | None = None,
    to_messages: Callable[[str], prompts.Turns] = prompts.messages,
    label: str = "answers",
    keep: Path | None = None,
) -> pd.DataFrame:
    """Answers of a model for cases (columns subject_id, hadm_id, note), one row per case and
    sample, in the order of cases.

    Greedy at temperature 0, else `samples` draws per case, the same for the same `seed` whatever
    ran before. Lengths and batch size are the profile's (of the one in force, if none is given).
    `predicted` is the normalised code, null where the answer is unusable: no code, or one that is
    neither in ICD-10-CM nor in `dictionary` (MIMIC's own). valid_codes: decode under a trie of
    these, from `<diagnosis>` on. label: of the progress bar. keep: a folder for finished batches;
    the same call with the same folder goes on after them. Where memory runs out, batches are
    halved. Research use only: no answer is a diagnosis.

    Raises ValueError for bad sizes, and for prompts that the model's context or embeddings do not
    hold; FloatingPointError for a model that computes no finite numbers; MemoryError where a single
    case does not fit.
    """
    import torch

    profile = profile or profiles.current()
    size = profile.batch_size(samples or 1) if batch_size is None else batch_size
    if min(size, samples) < 1 or (samples > 1 and temperature <= 0):
        raise ValueError(
            "predict: batch_size and samples must be >= 1, and several samples need a temperature "
            "above 0."
        )
    options = {
        "max_new_tokens": max_new_tokens or profile.max_new_tokens,
        "num_return_sequences": samples,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    trie = None if valid_codes is None else CodeTrie(tokenizer, valid_codes)
    questions = _questions(tokenizer, cases, to_messages, profile.max_note_tokens)
    completions = []
    start = 0
    with _plain_generation(model, tokenizer), places.progress(len(questions), label) as bar:
        while start < len(questions):
            batch = questions.iloc[start : start + size]
            key = {"cases": batch["hadm_id"].tolist(), "options": options}
            path = keep / f"{start}.json" if keep else None
            record = places.read(path) if path else {}
            if record.get("key") != key:
                if seed is not None:
                    torch.manual_seed(seed + start)  # it does not matter which batches were kept
                try:
                    answers = _generate(model, tokenizer, batch, trie, options)
                except (RuntimeError, MemoryError) as error:
                    size = _smaller(error, len(batch))
                    continue
                record = {"key": key, "completions": answers}
                if path:
                    places.write(path, record)
            completions += record["completions"]
            start += len(batch)
            bar.update(len(batch))
    table = questions.loc[questions.index.repeat(samples)]
    table = table.assign(completion=table["opening"] + completions)
    return _parsed(table.sort_index(kind="stable"), {*map(icd.normalise, dictionary or ())})


def _questions(
    tokenizer: Any, cases: pd.DataFrame, to_messages: Callable, max_note_tokens: int
) -> pd.DataFrame:
    """The cases with their prompt and what it gives away of the answer, by place in the table.

    The longest come first: a batch wastes little padding, and memory trouble shows at once.
    """
    dialogues = [
        to_messages(prompts.truncate_note(note, tokenizer, max_note_tokens))
        for note in cases["note"]
    ]
    table = cases[["subject_id", "hadm_id"]].reset_index(drop=True)
    table["prompt"] = [prompts.chat(tokenizer, turns) for turns in dialogues]
    table["opening"] = [prompts.opening(turns) for turns in dialogues]
    return table.sort_values("prompt", key=lambda texts: -texts.map(len), kind="stable")


def _generate(
    model: Any, tokenizer: Any, batch: pd.DataFrame, trie: CodeTrie | None, options: dict
) -> list[str]:
    """The completions of a batch, all samples of a prompt together."""
    import torch
    from transformers import LogitsProcessorList

    texts = batch["prompt"].tolist()
    encoding = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: encoding[name].to(model.device) for name in ("input_ids", "attention_mask")}
    width = inputs["input_ids"].shape[1]
    _check_limits(model, inputs["input_ids"], options["max_new_tokens"])
    processors = [partial(_check_finite, model.dtype)]
    if trie:
        processors.append(trie)
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            **options,
            logits_processor=LogitsProcessorList(processors),
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)


def _check_limits(model: PreTrainedModel, ids: torch.Tensor, new: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    width = ids.shape[1]
    if context and width + new > context:
        raise ValueError(
            f"predict: a prompt of {width} tokens and {new} of an answer do not go into the "
            f"model's context of {context}: set max_note_tokens or max_new_tokens lower."
        )
    size = model.get_input_embeddings().weight.shape[0]
    if ids.max() >= size:
        raise ValueError(
            f"predict: token {ids.max()} has no embedding, there are {size}: this tokenizer is not "
            "the model's."
        )


def _check_finite(precision: Any, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that changes nothing. Decoding would take NaN for token 0, and the model
    for a bad one."""
    if not scores.amax(dim=-1).isfinite().all():
        raise FloatingPointError(
            f"predict: in {precision} this model computes logits that are no finite numbers. "
            "float16 overflows in some models, Qwen2.5 among them; on a GPU without bfloat16 4-bit "
            "layers compute in it: load it with four_bit=False there, or take a newer GPU. "
            "Elsewhere its weights are damaged: copy or download them again."
        )
    return scores


def _smaller(error: Exception, size: int) -> int:
    """Half the batch after a lack of memory. Raises another error as it is, MemoryError where one
    case is too much."""
    if not isinstance(error, MemoryError) and not memory.is_out_of_memory(error):
        raise error
    if size == 1:
        raise MemoryError(
            "predict: a single case does not fit. Set max_note_tokens or max_new_tokens lower, "
            "draw fewer samples, or load the model with four_bit=True. What was answered before "
            "is kept where `keep` names a folder."
        ) from error
    places.say(f"memory does not hold {size} cases at once: going on with {size // 2}")
    return size // 2


def _parsed(table: pd.DataFrame, known: set[str | None]) -> pd.DataFrame:
    """The table of predictions; known: codes that count although ICD-10-CM has them no longer."""
    answers = [prompts.parse(completion) for completion in table["completion"]]
    table["sample"] = table.groupby(level=0).cumcount()
    table["think"] = [answer.think for answer in answers]
    table["predicted"] = [
        answer.code if icd.is_valid(answer.code, known) else None for answer in answers
    ]
    return table.reset_index(drop=True)[list(COLUMNS)]


@contextmanager
def _plain_generation(model: Any, tokenizer: Any) -> Iterator[None]:
    """Evaluation mode, padding on the left, and none of a model's own habits of generation
    (penalties, banned words, assistants) but for the tokens that end and fill. Afterwards all is as
    it was."""
    from transformers import GenerationConfig

    was_training = model.training
    side = tokenizer.padding_side
    habits = model.generation_config
    model.eval()
    tokenizer.padding_side = "left"
    ends = prompts.ends(tokenizer, habits.eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
        model.generation_config = habits


class CodeTrie:
    """A logits processor: only `codes` (dotted), then `</diagnosis>`, may follow a `<diagnosis>`.

    Building it decodes the vocabulary once. The trie is over characters of the decoded text, not
    over tokens, so it holds for any way to split a code into tokens. For evaluation only: a reward
    under constraint would teach nothing about format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, codes: Iterable[str]) -> None:
        texts = [f"{code}{prompts.CLOSE}" for code in {*map(icd.dotted, codes)} - {None}]
        if not texts:
            raise ValueError("valid_codes is empty: name the codes that may be answered.")
        letters = set("".join(texts))
        before = tokenizer(">", add_special_tokens=False)["input_ids"][-1:]
        # At the start of a text, some decoders drop a blank.
        skipped = len(tokenizer.decode(before))
        self.tokenizer = tokenizer
        self.prefixes = {text[:n] for text in texts for n in range(len(text) + 1)}
        self.pieces = {}  # token -> text, of those that a code may hold
        for token in range(len(tokenizer)):
            piece = tokenizer.decode([*before, token])[skipped:]
            if piece and letters.issuperset(piece):
                self.pieces[token] = piece
        self.after = cache(self._after)

    def _after(self, text: str) -> list[int]:
        """The tokens that may follow the beginning of a code."""
        return [token for token, piece in self.pieces.items() if text + piece in self.prefixes]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, text in enumerate(self.tokenizer.batch_decode(input_ids[:, -LONGEST_CODE:])):
            _, tag, beginning = text.rpartition(prompts.OPEN)
            tokens = self.after(beginning.lstrip()) if tag else []
            if tokens:
                allowed = scores[row, tokens]
                scores[row] = float("-inf")
                scores[row, tokens] = allowed
        return scores
