"""Base model, tokenizer, chat template, NF4 and adapters: one code path for the tiny Qwen2 and for
Qwen2.5-7B.

Taught in notebooks 3, 4 and 6.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import prompts
from helpers.machinery import cpu, memory
from helpers.profiles import TINY_BASE

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

CARD = Path(__file__).with_name("models_card.md.j2")
OPEN_REASONING = "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
# Put before a chat template that drops or refuses system turns: their text begins the next turn of
# the user.
MERGE_SYSTEM = (
    "{%- set plan = namespace(turns=[], system='') %}{%- for turn in messages %}"
    "{%- if turn['role'] == 'system' %}"
    "{%- set plan.system = plan.system ~ turn['content'] ~ '\\n\\n' %}"
    "{%- elif turn['role'] == 'user' %}"
    "{%- set plan.turns = plan.turns + [dict(turn, content=plan.system ~ turn['content'])] %}"
    "{%- set plan.system = '' %}"
    "{%- else %}{%- set plan.turns = plan.turns + [turn] %}{%- endif %}"
    "{%- endfor %}{%- set messages = plan.turns %}{{- '' }}"
)
# Weights that may be left over or missing: PPO's value head, buffers of older versions, what PEFT
# loads by other ways.
HARMLESS = re.compile(
    r"\bv_head\.|rotary_emb\.inv_freq$|\batt(n|ention)\.(masked_)?bias$"
    r"|^prompt_embeddings$|^prefix_task_|vblora_vector_bank"
)
NO_ADAPTER = (
    " holds no adapter (adapter_config.json is missing). Train one with 03_lora_sft, or give a "
    "folder or a hub id that has one."
)
NO_MODEL = (
    ": no model is there (config.json is missing). Give a folder in Hugging Face's layout, or a "
    "hub id such as Qwen/Qwen2.5-7B-Instruct (for a profile: ICD_BASE). Without the hub, `make "
    "small-base` makes the base of `small`. The tiny profile shuts the hub off unless you set "
    "HF_HUB_OFFLINE=0 before you start; a gated model asks for `hf auth login`."
)
# Kinds of adapters whose layers PEFT cannot merge, although their models have the method.
NEVER_MERGED = ("LILY", "POLY", "SHADOW", "XLORA")


def base_path(base: str) -> str:
    """Where a profile's base is loaded from: the bundled folder for "tiny", else the hub id or
    local folder as it stands."""
    return str(TINY_BASE) if base == "tiny" else base


def dtype_for_device() -> torch.dtype:
    """The precision of what is not quantised: bfloat16 where the GPU computes in it (compute
    capability >= 8.0), float32 elsewhere.

    On older GPUs, such as a T4, Qwen2 overflows in float16. On a CPU bf16 is mostly emulated: 2 to
    5 times slower.
    """
    import torch

    has_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return torch.bfloat16 if has_bf16 else torch.float32


def nf4() -> BitsAndBytesConfig:
    """The 4-bit NormalFloat configuration of QLoRA (Dettmers et al. 2023, sections 3.1 and 3.2),
    for GPU and CPU."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig

    compute = dtype_for_device()
    if torch.cuda.is_available():
        if compute == torch.float32:
            compute = torch.float16  # the 4-bit layers alone: float32 would be slow on such a GPU
    else:
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first eval() and later
        # gradients are wrong.
        bnb.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load(
    profile: Any,
    adapter: str | Path | None = None,
    *,
    four_bit: bool = False,
    trainable: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a profile, on the device, with an adapter on top if one is named.

    profile: a `profiles.Profile`, or a base as text ("tiny", a hub id, a folder; an adapter that
    names its base will do). four_bit: NF4, else the device's own dtype. trainable: keep the
    adapter's weights trainable, in float32. Raises what `resolve` and `load_tokenizer` raise, and
    ValueError for weights that are damaged, do not cover the model or are not all used: the
    libraries would take random numbers in their place, or leave them out.
    """
    source, adapter = resolve(getattr(profile, "base", profile), adapter)
    model = _load_base(source, four_bit)
    tokenizer = load_tokenizer(source)
    if adapter is not None:
        model = _add_adapter(model, adapter, trainable)
        tokenizer = _tokenizer_of(adapter, tokenizer)
    _choose_pad(tokenizer, model.get_input_embeddings().weight.shape[0])
    habits = model.generation_config
    habits.eos_token_id = prompts.ends(tokenizer, habits.eos_token_id)  # for roll-outs too
    if trainable:
        float32_adapters(model)
    else:
        model.eval()
    return model, tokenizer


@contextmanager
def _naming(fault: str) -> Iterator[None]:
    """Turn what a library raises into a ValueError that says the fault, but for a lack of files or
    of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | MemoryError) or memory.is_out_of_memory(error):
            raise
        raise ValueError(f"{fault} ({str(error)[:300]}). Copy or download it again.") from error


def _load_base(source: str, four_bit: bool) -> PreTrainedModel:
    """The base on the device, whole. Raises ValueError that names it."""
    import torch
    from bitsandbytes.optim import GlobalOptimManager
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed
    from transformers.utils import logging

    options = {"dtype": dtype_for_device(), "use_safetensors": True}
    if four_bit:
        options["quantization_config"] = nf4()
    if deepspeed.is_deepspeed_zero3_enabled():
        # a training that sharded its model went before; this model is whole
        deepspeed.unset_hf_deepspeed_config()
    if torch.cuda.is_available():
        # it holds the embeddings of every model that was trained
        GlobalOptimManager.get_instance().initialize()
        # layers of a model that is gone point at each other: the card holds them until then
        gc.collect()
        torch.cuda.empty_cache()
        options["device_map"] = {"": torch.cuda.current_device()}
    else:
        cpu.keep_memory()
        options["attn_implementation"] = "eager"  # faster than fused at a few hundred tokens
    if source == str(TINY_BASE):
        logging.disable_progress_bar()  # of a file that is read in a blink
    with _naming(f"{source}: its config.json or its weights cannot be read"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    misfits = [name for name, *_ in report["mismatched_keys"]]
    if four_bit:
        misfits += _misfits(model)
        cpu.unpack_once(model)
    names = [*report["missing_keys"], *report["unexpected_keys"], *misfits]
    _refuse(names, f"{source}: its files lack, leave over or have in another size")
    model.config.use_cache = True
    return model


def _misfits(model: PreTrainedModel) -> list[str]:
    """Weights of another size than the config says; transformers does not check those that it packs
    in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plan = AutoModelForCausalLM.from_config(model.config)
    sizes = {}
    for name, weight in model.named_parameters():
        sizes[name] = (getattr(weight, "quant_state", None) or weight).shape
    weights = plan.named_parameters()
    return [name for name, weight in weights if sizes.get(name, weight.shape) != weight.shape]


def _refuse(names: Iterable[str], fault: str) -> None:
    """Raise ValueError if there are such weights, but for harmless ones."""
    names = sorted(name for name in names if not HARMLESS.search(name))
    if names:
        raise ValueError(
            f"{fault} {len(names)} of the weights that the config asks for: {names[0]}, ...."
        )


def _add_adapter(model: Any, adapter: str, trainable: bool = False) -> PeftModel:
    """The model with an adapter on top. PEFT takes random numbers for missing weights, and leaves
    out those without a place."""
    from peft import PeftModel

    with _naming(f"{adapter} does not fit the base, or is damaged"):
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        report = adapted.load_adapter(adapter, "default", is_trainable=trainable)
    names = [*report.missing_keys, *report.unexpected_keys]
    _refuse(names, f"{adapter} does not fit the base: its file lacks, or leaves over,")
    return adapted


def float32_adapters(model: torch.nn.Module) -> None:
    """Cast trainable parameters to float32: TRL leaves QLoRA adapters in bf16, and resuming is then
    not exact."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_tokenizer(source: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer with left padding, whose chat template opens the reasoning: its generation prompt
    ends with `<think>` + newline.

    The prefix stands in the template, not in the messages: SFT, GRPO, generation and vLLM then
    agree on it, and it is saved with the tokenizer. So does the system turn, where the model's own
    template has no place for one. The tags of an answer are plain text, the end of a turn is a
    special token: decoding keeps the former and drops the latter. template: for a tokenizer that
    has none. Raises ValueError, with the source, for a tokenizer without a chat template or with
    one that cannot be used, and for one that cannot be read, knows no words (tokenizer.json is
    missing) or no tags.
    """
    from transformers import AutoTokenizer

    with _naming(f"{source}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(base_path(source))
    template = tokenizer.chat_template or template or ""
    if isinstance(template, dict):  # several, by name
        template = template.get("default", "")
    for beginning in ("", MERGE_SYSTEM):
        tokenizer.chat_template = beginning + template
        if _shows_all_turns(tokenizer):
            break
    else:
        raise ValueError(
            f"{source}: no tokenizer with a chat template that writes what the system, the user "
            "and the assistant say. Use an instruct model, or set tokenizer.chat_template."
        )
    question = prompts.chat(tokenizer, [{"role": "user", "content": "x"}])
    if not question.rstrip().endswith("<think>"):
        tokenizer.chat_template += OPEN_REASONING
    _mark_special(tokenizer)
    text = prompts.answer("chest pain", "I10")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not prompts.parse(tokenizer.decode(ids, skip_special_tokens=True)).is_well_formed:
        raise ValueError(
            f"{source}: its tokenizer knows no words. Is tokenizer.json missing? Copy or download "
            "it again."
        )
    _choose_pad(tokenizer, len(tokenizer))
    tokenizer.padding_side = "left"
    return tokenizer


def _shows_all_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes what each role says, before an answer and with one."""
    roles = ("system", "user", "assistant")
    turns = [{"role": role, "content": f"0{role}0"} for role in roles]
    turns[2]["content"] = prompts.THINK + prompts.answer("0assistant0", "I10")
    try:
        asked = prompts.chat(tokenizer, turns[:2])
        told = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # whatever a template can trip over
        return False
    return (
        "0system0" in asked and "0user0" in asked and "0system0" in told and "0assistant0" in told
    )


def _mark_special(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tags, and tokens that hold or cut one, plain text, and the end of a turn a special
    token."""
    from tokenizers import Tokenizer

    end = prompts.end_of_turn(tokenizer)
    changed = []
    for number, token in tokenizer.added_tokens_decoder.items():
        is_tag = any(token.content in tag or tag in token.content for tag in prompts.TAGS)
        is_wrong = is_tag if token.special else number == end
        if is_wrong:
            changed.append(token.content)
    if changed:
        record = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in record["added_tokens"]:
            if token["content"] in changed:
                token["special"] = not token["special"]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(record))  # its methods only add marks
        extra = tokenizer.extra_special_tokens
        tokenizer.extra_special_tokens = [text for text in extra if text not in changed]


def _choose_pad(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Pad with a token that has one of `size` embeddings. Which one does not matter: padding is
    masked."""
    if tokenizer.pad_token_id not in range(size):
        ends = [token for token in prompts.ends(tokenizer, 0) if token < size]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[-1])


def _tokenizer_of(adapter: str, fallback: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if _file(adapter, "tokenizer_config.json") and any(_file(adapter, name) for name in names):
        return load_tokenizer(adapter, fallback.chat_template)
    return fallback


def resolve(base: str, adapter: str | Path | None = None) -> tuple[str, str | None]:
    """(base, adapter) of a model, each a folder or a hub id; where `base` is an adapter, the base
    that it names, and it.

    Nothing is loaded. Raises FileNotFoundError for what is not there, and for weights that are
    pickled; ValueError for an adapter that names no base.
    """
    source = base_path(str(base))
    origin = ""
    if adapter is None and _file(source, "adapter_config.json"):
        adapter = source
        source = _base_of(adapter)
        origin = f", the base that {adapter} names,"
    if adapter is not None:
        adapter = str(adapter)
        _check_there(adapter, "adapter_config.json", "adapter_model.safetensors", NO_ADAPTER)
    _check_there(source, "config.json", "*.safetensors", origin + NO_MODEL)
    return source, adapter


def _check_there(source: str, config: str, weights: str, fault: str) -> None:
    if not _file(source, config):
        raise FileNotFoundError(source + fault)
    if Path(source).is_dir() and not any(Path(source).glob(weights)):
        raise FileNotFoundError(
            f"{source}: no weights in safetensors. Pickles (*.bin) can run code when they are "
            "read, so they are not: convert them with save_pretrained(), where you trust them."
        )


def _base_of(adapter: str) -> str:
    """The base that an adapter names; a relative path is looked for beside the adapter too."""
    config = _file(adapter, "adapter_config.json")
    with _naming(f"{config} does not say which base the adapter is for; give both"):
        base = json.loads(config.read_bytes())["base_model_name_or_path"]
        beside = Path(adapter).parent / base
    return str(beside) if beside.is_dir() and not Path(base).exists() else base


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a folder or of a hub repository, None where there is none."""
    from transformers.utils import cached_file

    try:
        file = cached_file(str(source), name)
    except OSError:  # no such file, folder or repository
        return None
    return Path(file) if file else None  # for a config.json that a folder lacks: None


def files(*folders: str | Path | None) -> dict[str, list[int]]:
    """Size and time of the weights and configs in local folders, by path: whether a model is still
    the one it was."""
    kinds = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
    folders = [Path(folder) for folder in folders if folder]
    paths = sorted(path for folder in folders for kind in kinds for path in folder.glob(kind))
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def merge(
    profile: Any, adapter: str | Path, out_dir: str | Path, *, four_bit: bool = False
) -> Path:
    """Merge an adapter into its base at full precision and save safetensors, tokenizer and chat
    template to out_dir.

    An adapter trained on an NF4 base is merged into that base *dequantised*: merging into 4-bit
    weights rounds them again. Raises ValueError, before anything is loaded, for a base in few bits
    and an adapter that is no change of weights.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    source, adapter = resolve(getattr(profile, "base", profile), adapter)
    _check_mergeable(source, adapter)
    base, tokenizer = load(source, four_bit=four_bit)
    habits = base.generation_config
    if habits.temperature or habits.top_p or habits.top_k:
        habits.do_sample = True  # else transformers does not save it
    if four_bit:
        # Before the adapter goes on: its layers suit the weights they find.
        base = base.dequantize()
    adapted = _add_adapter(base, adapter)
    ends = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    config = base.config.get_text_config()
    if config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        head = getattr(ends[1], "base_layer", ends[1])
        weight = head.weight.detach().clone()  # else what is meant for one goes into both
        head.weight = torch.nn.Parameter(weight)
        config.tie_word_embeddings = base.config.tie_word_embeddings = False
    adapted.merge_and_unload().save_pretrained(str(out_dir), safe_serialization=True)
    _tokenizer_of(adapter, tokenizer).save_pretrained(str(out_dir))
    return Path(out_dir)


def _check_mergeable(source: str, adapter: str) -> None:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    with _naming(f"{source} or {adapter}: its config cannot be read"):
        config = json.loads(_file(source, "config.json").read_bytes())
        adapter_config = PeftConfig.from_pretrained(adapter)
        kind = adapter_config.peft_type
        can_merge = hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload")
    if "quantization_config" in config:
        raise ValueError(
            f"{source} is stored in few bits: merge into the model that it was made from."
        )
    is_conditional = getattr(adapter_config, "alora_invocation_tokens", None)
    if kind in NEVER_MERGED or is_conditional or not can_merge:
        raise ValueError(
            f"{adapter} cannot be merged: {kind} is no change of the base's weights, as LoRA is. "
            "Load it as an adapter."
        )


def write_card(
    folder: str | Path,
    profile: Any,
    metrics: dict[str, Any],
    *,
    model: str,
    data: str,
    credentialed: bool,
) -> Path:
    """Model card (README.md) of an exported model, filled in from the run: what it is, data,
    metrics with intervals, limits.

    metrics: metrics.json; model: its key there; data: one line on the training data; credentialed:
    whether it was MIMIC-IV, which the card then warns of. Raises KeyError where metrics.json does
    not hold the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = profile.base
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers"),
        template_path=str(CARD),
        profile=profile,
        scores=metrics["models"][model],
        metrics=metrics,
        model=model,
        data=data,
        credentialed=credentialed,
        base=Path(base).name if Path(base).is_dir() else base,  # no path of this machine
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def tiny_manifest() -> dict[str, Any]:
    """What the bundled base was made from: hashes of weights, tokenizer, casebook and generator,
    command, held-out perplexity."""
    return json.loads((TINY_BASE / "manifest.json").read_bytes())
