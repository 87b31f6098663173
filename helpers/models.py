"""Base model, tokenizer, chat template, NF4 and adapters: one code path for the tiny Qwen2 and for Qwen2.5-7B."""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import course

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY_BASE = Path(__file__).parent / "tiny_base"
EXPORTED = [
    "*.safetensors",
    "*config.json",
    "*.index.json",
    "course_export.json",
    "tokenizer*",
    "*_map.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "README.md",
]
THINK = "<think>\n"
_THINK_TEMPLATE = "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"


def base_path(base: str) -> str:
    """Where a profile's base is loaded from: the bundled folder for "tiny", else the hub id or local folder as it stands."""
    return str(TINY_BASE) if base == "tiny" else base


def dtype_for_device() -> torch.dtype:
    """bfloat16 where the GPU computes in it (compute capability >= 8.0), float16 on older GPUs, float32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32  # bf16 on a CPU is mostly emulated: 2 to 5 times slower
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def nf4() -> BitsAndBytesConfig:
    """The 4-bit NormalFloat configuration of QLoRA (Dettmers et al. 2023, sections 3.1 and 3.2), for GPU and CPU."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first eval() and later gradients are wrong.
        bnb.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_for_device(),
    )


def keep_memory() -> bool:
    """On Linux, let glibc keep freed blocks: training on a CPU otherwise hands its large tensors back to the kernel at every
    step and has each page zeroed again (a third of the time of a tiny model). Returns whether it took effect."""
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        return all(
            [libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)]
        )  # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):
        return False  # another system or another libc


def unpack_once(model: Any, most: int = 50_000_000) -> int:
    """On a CPU, let 4-bit layers keep their unpacked weights for passes without gradient (generation); returns how many do.

    A CPU spends most of a token on unpacking: bitsandbytes does it anew at each call, and frozen weights come out the same each
    time. Passes with gradient go through bitsandbytes as ever. Above `most` parameters none does: a copy is full size.
    """
    import bitsandbytes as bnb
    import torch

    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    if torch.cuda.is_available() or sum(m.in_features * m.out_features for m in layers) > most:
        return 0
    for layer in layers:
        kept: dict[torch.dtype, torch.Tensor] = {}

        def forward(
            x: Any, layer: Any = layer, packed: Any = layer.forward, kept: dict = kept
        ) -> Any:
            if torch.is_grad_enabled():
                return packed(x)
            if x.dtype not in kept:
                kept[x.dtype] = bnb.functional.dequantize_4bit(
                    layer.weight.data, layer.weight.quant_state
                ).to(x.dtype)
            return torch.nn.functional.linear(x, kept[x.dtype], layer.bias)

        layer.forward = forward
    return len(layers)


def load_tokenizer(source: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer with left padding, whose chat template opens the reasoning: its generation prompt ends with `<think>` + newline.

    The prefix stands in the template, not in the messages: SFT, GRPO, generation and vLLM then agree on it, and it is saved
    with the tokenizer. template: for a tokenizer that has none. Raises ValueError for a tokenizer without a chat template, and
    for one that cannot be read or knows no words, as where tokenizer.json is missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_path(source))
    except ValueError as error:  # JSON among it
        raise ValueError(
            f"{source}: its tokenizer cannot be read ({error}). Copy or download it again."
        ) from error
    if not tokenizer("chest pain", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{source}: its tokenizer knows no words. Is tokenizer.json missing? Copy or download it again."
        )
    tokenizer.chat_template = tokenizer.chat_template or template
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{source}: no tokenizer with a chat template. Use an instruct model, or set tokenizer.chat_template."
        )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    if not prompt.rstrip().endswith(THINK.rstrip()):
        tokenizer.chat_template += _THINK_TEMPLATE
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a folder or of a hub repository, None where there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(source),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # neither a folder nor a repository's name
        return None
    return Path(found) if found else None


def _base_of(config: Path) -> str:
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not base:
        raise ValueError(
            f"{config} does not say which base the adapter is for (base_model_name_or_path): mend it, or give both."
        )
    return str(base)


def resolve(base: str, adapter: str | Path | None = None) -> tuple[str, str | None]:
    """(base, adapter) of a model, each a folder or a hub id; where `base` is an adapter, the base that it names, and it.

    Nothing is loaded. Raises FileNotFoundError for what is not there, and for weights that are pickled; ValueError for an adapter
    that names no base.
    """
    source = base_path(str(base))
    if adapter is None and (config := _file(source, "adapter_config.json")):
        source, adapter = _base_of(config), source
        beside = (Path(adapter, source), Path(adapter).parent / source)
        source = next(
            (str(path) for path in beside if not Path(source).exists() and path.is_dir()), source
        )
    if adapter is not None and not _file(adapter, "adapter_config.json"):
        raise FileNotFoundError(
            f"{adapter} holds no adapter (adapter_config.json is missing). Train one with 03_lora_sft, or "
            "give a folder or a hub id that has one."
        )
    if not _file(source, "config.json"):
        of = f", the base that {adapter} names," if adapter == base_path(str(base)) else ""
        raise FileNotFoundError(
            f"{source}{of}: no model is there (config.json is missing). Give a folder in Hugging Face's "
            "layout, or a hub id such as Qwen/Qwen2.5-7B-Instruct. The tiny profile shuts the hub off unless "
            "you set HF_HUB_OFFLINE=0 before you start; a gated model asks for `hf auth login`."
        )
    for folder, weights in (
        (source, "*.safetensors"),
        (adapter or "", "adapter_model.safetensors"),
    ):
        if folder and Path(folder).is_dir() and not [*Path(folder).glob(weights)]:
            found = ", ".join(sorted(path.name for path in Path(folder).glob("*.bin"))) or "none"
            raise FileNotFoundError(
                f"{folder}: no weights in safetensors (pickled: {found}). Pickles can run code when they are "
                "read, so they are not: convert them with save_pretrained(), where you trust them."
            )
    return source, adapter and str(adapter)


def load(
    profile: Any,
    adapter: str | Path | None = None,
    *,
    four_bit: bool = False,
    trainable: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a profile, on the device, with an adapter on top if one is named.

    profile: a `profiles.Profile`, or a base as text ("tiny", a hub id, a folder; an adapter that names its base will do).
    four_bit: NF4, else the device's own dtype. trainable: keep the adapter's weights trainable, in float32.
    Raises what `resolve` raises, and ValueError for weights that are damaged or do not cover the model: the libraries would
    answer with random numbers in their place.
    """
    import torch
    from bitsandbytes.optim import GlobalOptimManager
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed
    from transformers.utils import logging as hf_logging

    source, adapter = resolve(profile if isinstance(profile, str) else profile.base, adapter)
    kwargs: dict[str, Any] = {"dtype": dtype_for_device(), "use_safetensors": True}
    if four_bit:
        kwargs["quantization_config"] = nf4()
    if deepspeed.is_deepspeed_zero3_enabled():
        deepspeed.unset_hf_deepspeed_config()  # a training that sharded its model went before; this one is whole
    if torch.cuda.is_available():
        GlobalOptimManager.get_instance().initialize()  # it holds the embeddings of every model that was trained
        gc.collect()  # layers of a model that is gone point at each other: until it is collected, the card holds it
        torch.cuda.empty_cache()
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    else:
        keep_memory()
        kwargs["attn_implementation"] = (
            "eager"  # at a few hundred tokens faster than torch's fused attention on a CPU
        )
    if source == str(TINY_BASE):
        hf_logging.disable_progress_bar()  # of a file that is read in a blink
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(
            f"{source}: its weights cannot be read ({error}). Copy or download them again."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source}: its files lack {len(missing)} of the weights that config.json asks for: {missing[0]}, ...."
        )
    tokenizer = load_tokenizer(source)
    model.config.use_cache = True
    if four_bit:
        unpack_once(model)
    if adapter is not None:
        model, tokenizer = (
            _adapted(model, adapter, trainable=trainable),
            _tokenizer_of(adapter, tokenizer),
        )
    if trainable:
        float32_adapters(model)
    else:
        model.eval()
    return model, tokenizer


def _adapted(model: Any, adapter: str, *, trainable: bool = False) -> PeftModel:
    """The model with an adapter on top. PEFT only warns where weights are missing, and takes random ones."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (UserWarning, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"{adapter} does not fit the base, or is damaged: {str(error)[:300]}"
        ) from error


def files(*folders: str | Path | None) -> dict[str, list[int]]:
    """Size and time of the weights and configs in local folders, by path: whether a model is still the one it was."""
    kinds = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
    found = [
        path for folder in folders if folder for kind in kinds for path in Path(folder).glob(kind)
    ]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(found)}


def _tokenizer_of(
    adapter: str | Path, fallback: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    whole = _file(adapter, "tokenizer_config.json") and any(
        _file(adapter, name) for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    )
    return load_tokenizer(str(adapter), fallback.chat_template) if whole else fallback


def float32_adapters(model: Any) -> int:
    """Cast trainable parameters to float32 (TRL leaves QLoRA adapters in bf16: resuming is then not exact). Returns how many."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return sum(p.numel() for p in trainable)


def truncate_note(note: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The note cut to at most max_tokens tokens, from its end: prompts are shortened here, answers never."""
    ids = tokenizer(note, add_special_tokens=False)["input_ids"]
    return (
        note
        if len(ids) <= max_tokens
        else tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
    )


def merge(
    profile: Any, adapter: str | Path, out_dir: str | Path, *, four_bit: bool = False
) -> Path:
    """Merge an adapter into its base at full precision and save safetensors, tokenizer and chat template to out_dir.

    An adapter trained on an NF4 base is merged into that base *dequantised*: merging into 4-bit weights rounds them again.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    mark = Path(out_dir) / "course_export.json"
    mark.unlink(missing_ok=True)  # `push` waits for the card of the new one
    source, _ = resolve(profile if isinstance(profile, str) else profile.base, adapter)
    if "quantization_config" in json.loads(
        _file(source, "config.json").read_text(encoding="utf-8")
    ):
        raise ValueError(
            f"{source} is stored in few bits: merge into the model that it was made from."
        )
    base, tokenizer = load(profile, four_bit=four_bit)
    if (
        base.generation_config.temperature
        or base.generation_config.top_p
        or base.generation_config.top_k
    ):
        base.generation_config.do_sample = True  # else transformers does not save it
    if four_bit:
        base = (
            base.dequantize()
        )  # before the adapter goes on: its layers are built for the kind of weight they find
    adapted = _adapted(base, str(adapter))
    ends = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer) for end in ends
    ):
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = torch.nn.Parameter(
            head.weight.detach().clone()
        )  # else what is meant for one goes into both
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    merged, tokenizer = adapted.merge_and_unload(), _tokenizer_of(adapter, tokenizer)
    merged.save_pretrained(str(out_dir), safe_serialization=True)
    tokenizer.save_pretrained(str(out_dir))
    if course.read(Path(source) / mark.name).get("credentialed"):
        course.write(mark, {"credentialed": True})  # what was made of it is no freer
    return Path(out_dir)


def write_card(
    folder: str | Path,
    profile: Any,
    metrics: dict[str, Any],
    *,
    model: str,
    data: str,
    credentialed: bool,
) -> Path:
    """Model card (README.md) of an exported model, filled in from the run: what it is, data, metrics with intervals, limits.

    metrics: metrics.json; model: its key there; data: one line on the training data; credentialed: whether it was MIMIC-IV, which
    `push` asks for; a folder or a base that is marked so stays so. Raises KeyError where metrics.json does not hold the model.
    """
    from jinja2 import Environment, StrictUndefined

    template = (Path(__file__).parent / "model_card.md.j2").read_text(encoding="utf-8")
    card, mark = Path(folder) / "README.md", "course_export.json"
    before = [
        path
        for path in (Path(folder) / mark, Path(base_path(profile.base)) / mark)
        if path.is_file()
    ]
    credentialed = credentialed or any(
        course.read(path).get("credentialed") is not False for path in before
    )
    base = (
        Path(profile.base).name if Path(profile.base).is_dir() else profile.base
    )  # no path of this machine
    page = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        template
    )
    card.write_text(
        page.render(
            profile=profile,
            scores=metrics["models"][model],
            metrics=metrics,
            model=model,
            data=data,
            credentialed=credentialed,
            base=base,
        ),
        encoding="utf-8",
    )
    course.write(
        Path(folder) / mark,
        {"model": model, "data": data, "credentialed": credentialed, "weights": _sums(folder)},
    )
    return card


def _sums(folder: str | Path) -> dict[str, str]:
    """sha256 of each file of weights, in subfolders too."""
    sums = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with path.open("rb") as weights:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(weights, "sha256").hexdigest()
    return sums


def push(
    folder: str | Path, repository: str, *, private: bool = True, allowed_to_share: bool = False
) -> str:
    """Upload an exported model to the Hugging Face hub: a deliberate act, which no notebook does by itself. Returns its address.

    Raises PermissionError for a model trained on credentialed data unless `allowed_to_share` says that you have cleared it
    with the data use agreement, and ValueError for a folder that was not exported with its card, or whose weights were changed
    since. Nothing goes along but EXPORTED.
    """
    export = Path(folder) / "course_export.json"
    if not export.is_file() or not (Path(folder) / "README.md").is_file():
        raise ValueError(
            f"{folder} holds no export with a model card. Make one at the end of 06_hierarchical_f1_analysis."
        )
    if course.read(export).get("credentialed") is not False and not allowed_to_share:
        raise PermissionError(
            f"{folder} was trained on credentialed data, and weights can repeat what they were trained on. The "
            "data use agreement forbids sharing it. If you have a permission, say allowed_to_share=True."
        )
    if course.read(export).get("weights") != _sums(folder):
        raise ValueError(
            f"{folder}: its weights are not those that its card was written for. Export it again, card and all."
        )
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return str(
        api.upload_folder(folder_path=str(folder), repo_id=repository, allow_patterns=EXPORTED)
    )


def tiny_manifest() -> dict[str, Any]:
    """What the bundled base was made from: hashes of weights, tokenizer, casebook and generator, command, held-out perplexity."""
    return json.loads((TINY_BASE / "manifest.json").read_text(encoding="utf-8"))
