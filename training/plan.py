"""What a recipe will need, told before anything is downloaded or trained: parameters, memory, disk, hours, licences.

Only configurations are read. Parameters are counted on the meta device; memory and hours are estimates, and the table
says what they assume.
"""

import shutil
from collections import Counter
from pathlib import Path

import soundfile
import torch
from huggingface_hub import ModelCard, model_info
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoConfig, TrainingArguments, WhisperConfig

from training.data import load_source
from training.recipe import Recipe, Source
from voxkrikri import VoxKrikriConfig, VoxKrikriForConditionalGeneration


STATES_PER_SECOND, TOKENS_PER_SECOND = 6.8, 6.5  # Greek speech: Whisper's tokens, and those of a Greek LLM
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40": 181,
    "4090": 165,
    "A10": 125,
    "3090": 71,
}  # dense bfloat16
UTILISATION, UNKNOWN_TFLOPS = 0.35, 100
MEASURED_CLIPS = 200  # of a manifest without durations
GIB = 2**30


def build_config(model: dict) -> VoxKrikriConfig:
    """The configuration that the recipe's `model` leads to, without any weights."""
    settings = {name: value for name, value in model.items() if name not in ("dtype", "text_kwargs")}
    if source := settings.pop("init_from", None):
        config = VoxKrikriConfig.from_pretrained(source)
        config.speech_model_id = settings.pop("speech", config.speech_model_id)
        config.update(settings)
        return config
    speech, text = settings.pop("speech"), settings.pop("text")
    return VoxKrikriConfig(
        speech_config=WhisperConfig.from_pretrained(speech, revision=settings.get("speech_model_revision")),
        text_config=AutoConfig.from_pretrained(text, revision=settings.get("text_model_revision")),
        speech_model_id=speech,
        text_model_id=text,
        **settings,
    )


def build_on_meta(config: VoxKrikriConfig) -> VoxKrikriForConditionalGeneration:
    """The model without its weights, and what is trained of it."""
    with torch.device("meta"):
        model = VoxKrikriForConditionalGeneration(config)
    model.freeze_backbones()
    return model


def count_parameters(model: VoxKrikriForConditionalGeneration) -> tuple[Counter, Counter]:
    """Parameters of every part, and those of them that are trained; tied ones once."""
    total, trained = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if name.startswith("speech_model."):
            part = "Whisper's decoder" if ".decoder." in name or "proj_out" in name else "Whisper's encoder"
        elif ".lora_" in name:
            part = "LoRA"
        elif name.startswith("fusion."):
            part = "fusion"
        elif name.startswith("language_model.lm_head."):
            part = "the LLM's head"
        else:
            part = "LLM"
        total[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
    return total, trained


def parameter_table(total: Counter, trained: Counter) -> list[str]:
    """A line a part, as `count_parameters` has them."""
    lines = ["parameters                        total         trained"]
    lines += [f"  {part:<28}{total[part] / 1e6:>10,.1f} M   {trained[part] / 1e6:>10,.2f} M" for part in total]
    share = trained.total() / total.total()
    return [*lines, f"  {'all':<28}{total.total() / 1e6:>10,.1f} M   {trained.total() / 1e6:>10,.2f} M   {share:.2%}"]


def hours_of(source: Source) -> float | None:
    """Hours of speech in a manifest; of a dataset only what the recipe says, since nothing but a download would tell."""
    if source.has_texts_alone:
        return 0.0
    if source.path is None:
        return source.hours
    folder, rows = Path(source.path).parent / source.folder, load_source(source)
    chosen = range(0, len(rows), max(1, len(rows) // MEASURED_CLIPS))
    seconds = []
    for row in rows.select(chosen):
        try:
            seconds.append(soundfile.info(folder / row["audio"]).duration)
        except (soundfile.SoundFileError, TypeError):
            continue  # training will count it
    return sum(seconds) / max(1, len(seconds)) * len(rows) / 3600


def bytes_an_hour(config: VoxKrikriConfig) -> float:
    """What an hour's states take on the disk, in bfloat16."""
    return 3600 * STATES_PER_SECOND * config.speech_config.d_model * 2


def require_disk(recipe: Recipe, config: VoxKrikriConfig) -> None:
    """Raises a ValueError where the states of the recipe's speech would not fit beside those that are there already."""
    folder = Path(recipe.prepared)
    hours = [hours_of(source) for source in recipe.data.train + recipe.data.validation]
    needed = sum(value for value in hours if value is not None) * bytes_an_hour(config)
    made = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    place = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed - made > free:
        raise ValueError(
            f"the states need about {(needed - made) / 1e9:.1f} GB more under {folder}, and {free / 1e9:.1f} GB are free "
            "there: set `prepared` to a folder on a larger disk, or `hours` of a source"
        )


def licence_of(name: str | None) -> str:
    """The licence that a model's card states."""
    if name is None:
        return "unknown"
    try:
        if Path(name).is_dir():
            card = Path(name) / "README.md"
            return (ModelCard.load(card).data.license if card.exists() else None) or "no card"
        return model_info(name).card_data.license or "none stated"
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, AttributeError):
        return "unknown: the Hub cannot be asked"


def estimate_memory(config: VoxKrikriConfig, args: TrainingArguments, model: dict, total: Counter, trained: Counter):
    """GPU memory in bytes, by what needs it, for one process."""
    text = config.text_config
    quantised = "quantization_config" in (model.get("text_kwargs") or {})
    half = "16" in str(model.get("dtype", "")) or "16" in str(text.dtype)
    bytes_each = 2 if half else 4
    frozen = {part: (total[part] - trained[part]) * bytes_each for part in total}
    if quantised:
        frozen["LLM"] = (total["LLM"] - trained["LLM"]) * 0.55  # 4 bits, and a scale for every 64 weights
    rows = args.per_device_train_batch_size * 30 * TOKENS_PER_SECOND  # a batch of the longest clips
    layer = rows * (10 * text.hidden_size + 3 * text.intermediate_size) * (2 if args.bf16 or half else 4)
    checkpointing = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", False)
    kept = rows * text.hidden_size * 2 * text.num_hidden_layers
    return {
        "weights": sum(frozen.values()),
        "trained weights, gradients and Adam (float32)": 16 * sum(trained.values()),
        "activations": kept + layer if checkpointing else layer * text.num_hidden_layers,
        "logits and their gradient": rows * text.vocab_size * 10,
        "CUDA itself": 0.8 * GIB,
    }


def plan(recipe: Recipe, args: TrainingArguments, card_gib: float | None = None) -> str:
    """The table that `train.py --plan` prints.

    Args:
        card_gib: memory of the card it is meant for; of the card at hand if left out.
    """
    config = build_config(recipe.model)
    total, trained = count_parameters(build_on_meta(config))
    lines = parameter_table(total, trained)

    memory = estimate_memory(config, args, recipe.model, total, trained)
    needed = sum(memory.values()) / GIB
    lines.append(f"GPU memory (estimate, batch {args.per_device_train_batch_size}, clips of 30 s)")
    lines += [f"  {name:<46}{value / GIB:>7.1f} GiB" for name, value in memory.items()]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if card_gib is None and name is not None:
        card_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    verdict = "no card at hand: --card GIB compares" if card_gib is None else ""
    if card_gib is not None and needed <= 0.95 * card_gib:
        verdict = f"fits a card of {card_gib:.0f} GiB"
    elif card_gib is not None:
        verdict = f"does not fit a card of {card_gib:.0f} GiB: {advise(args, recipe.model, memory)}"
    lines.append(f"  {'all':<46}{needed:>7.1f} GiB   {verdict}")

    known = [(source, hours_of(source)) for source in recipe.data.train]
    hours = sum(value for _, value in known if value is not None)
    taken = sum(min(value, source.hours or value) * source.weight for source, value in known if value is not None)
    unknown = [source.name for source, value in known if value is None]
    states = bytes_an_hour(config)
    lines.append(f"speech    {hours:,.1f} hours" + (f", and {', '.join(unknown)} (set its hours)" if unknown else ""))
    lines.append(f"disk      {hours * states / 1e9:,.2f} GB of states ({states / 1e6:.0f} MB an hour)")
    peak = next((value for key, value in PEAK_TFLOPS.items() if name and key in name), UNKNOWN_TFLOPS)
    rate = peak * 1e12 * UTILISATION * args.world_size
    window = 1500 / 30  # encoder positions a second
    listening = hours * 3600 * window * 2 * total["Whisper's encoder"] * 2 / rate / 3600  # the decoder as much again
    passes = args.num_train_epochs
    learning = passes * taken * 3600 * TOKENS_PER_SECOND * 6 * total["LLM"] / rate / 3600
    assumed = f"{peak} TFLOP/s at {UTILISATION:.0%}, {args.world_size} process(es)"
    lines.append(
        f"time      {listening:,.1f} h listening once, {learning:,.1f} h training ({passes:g} epochs; {assumed})"
    )
    for label, source in (("Whisper", config.speech_model_id), ("LLM", config.text_model_id)):
        lines.append(f"licence   {label}: {source or 'part of the checkpoint'}: {licence_of(source)}")
    return "\n".join(lines)


def advise(args: TrainingArguments, model: dict, memory: dict[str, float]) -> str:
    """What to change first where the memory is short: the largest part decides."""
    largest = max(memory, key=memory.get)
    if largest == "weights" and "quantization_config" not in (model.get("text_kwargs") or {}):
        return "use a 4-bit LLM (model.text_kwargs.quantization_config) or dtype: bfloat16"
    if largest.startswith("trained"):
        return "train less: LoRA of a smaller rank, no trained_text_modules, or FSDP over several cards"
    return f"use training.per_device_train_batch_size={max(1, args.per_device_train_batch_size // 2)} and gradient_checkpointing"
