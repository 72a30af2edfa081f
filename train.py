"""Trains the fusion (and LoRA, or more of the LLM) of a VoxKrikri on pairs of speech and text.

    python train.py recipes/mini/fusion.yaml
    python train.py recipes/mini/fusion.yaml training.learning_rate=5e-4 data.target=hypothesis   # overrides
    python train.py recipes/mini/fusion.yaml --plan     # what it will need; nothing is downloaded or trained
    python train.py prepare recipes/mini/fusion.yaml    # only listen to the clips, and keep what Whisper made of them

Recipes: `training/recipe.py`. Whisper is frozen, so it listens to each clip once: `training/data.py`. Started again on
the same output folder, a run goes on where it was stopped.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoTokenizer,
    TrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from training.data import LiveClips, PreparedClips, Texts, mix, prepare
from training.plan import count_parameters, parameter_table, plan, require_disk
from training.recipe import Recipe, Source, check_names, read_recipe
from training.trainer import Collator, FusionTrainer
from voxkrikri import VoxKrikriConfig, VoxKrikriForConditionalGeneration, VoxKrikriProcessor


RECIPE_COPY = "recipe.yaml"


def model_settings() -> list[str]:
    """The keys that a recipe's `model` may have."""
    known = [name for name in signature(VoxKrikriConfig.__init__).parameters if name not in ("self", "kwargs")]
    return ["init_from", "speech", "text", "dtype", "text_kwargs", *known]


def load_model(model: dict) -> tuple[VoxKrikriForConditionalGeneration, VoxKrikriProcessor]:
    """A model assembled from its backbones, or an earlier run's (`init_from`), whose settings may change.

    An earlier run without LoRA gets one here where the recipe asks for it: the fusion first, then the LLM. Where it names
    a Whisper (`speech`), that one takes the place of the earlier run's: the same Whisper, trained further.
    """
    settings = dict(model)
    check_names(settings, model_settings(), "model")
    if source := settings.pop("init_from", None):
        speech = settings.pop("speech", None)
        if "text" in settings:
            raise ValueError(f"model.init_from ({source}) has an LLM: leave model.text ({settings['text']}) out")
        config = VoxKrikriConfig.from_pretrained(source)
        lora = settings.pop("lora", None) if config.lora is None else None
        config.update(settings)
        model = VoxKrikriForConditionalGeneration.from_pretrained(source, config=config)
        if lora is not None:
            model.add_lora(lora)
        processor = VoxKrikriProcessor.from_pretrained(source)
        if speech is not None:
            replace_whisper(model, processor, speech)
        return model, processor
    speech, text = settings.pop("speech"), settings.pop("text")
    processor = VoxKrikriProcessor(
        WhisperFeatureExtractor.from_pretrained(speech),
        AutoTokenizer.from_pretrained(text),
        WhisperTokenizer.from_pretrained(speech),
    )
    model = VoxKrikriForConditionalGeneration.from_pretrained_backbones(
        speech, text, tokenizer=processor.tokenizer, speech_tokenizer=processor.speech_tokenizer, **settings
    )
    return model, processor


def replace_whisper(model: VoxKrikriForConditionalGeneration, processor: VoxKrikriProcessor, speech: str) -> None:
    """Puts the Whisper `speech` (a folder or Hub id) in the place of the model's, which has the same shapes and pieces."""
    whisper = WhisperForConditionalGeneration.from_pretrained(speech, dtype=model.speech_model.dtype)
    tokenizer = WhisperTokenizer.from_pretrained(speech)
    given, known = ({name: p.shape for name, p in w.named_parameters()} for w in (whisper, model.speech_model))
    if given != known or tokenizer.get_vocab() != processor.speech_tokenizer.get_vocab():
        raise ValueError(
            f"model.speech ({speech}) has other layers or another vocabulary than the Whisper of model.init_from: only "
            "the same Whisper, trained further, may take its place. Assemble a new model from speech and text"
        )
    model.speech_model.load_state_dict(whisper.state_dict())
    model.speech_model.generation_config = whisper.generation_config
    model.config.speech_generation_config = whisper.generation_config.to_dict()
    model.config.speech_model_id, model.config.speech_model_revision = speech, None
    processor.speech_tokenizer = tokenizer


def claim_output(output: Path, recipe: Recipe) -> None:
    """Keeps the recipe beside what it makes, and refuses a folder that holds another recipe's run or other files.

    A run may be gone on from with other `training` settings, such as more steps.
    """
    if (output / "voxkrikri.py").exists():
        raise ValueError(f"{output} is the project's own root: train into a folder of its own")
    kept, content = output / RECIPE_COPY, asdict(recipe)
    if kept.exists():
        before = yaml.safe_load(kept.read_text(encoding="utf-8"))
        differing = [part for part in ("model", "data", "learning_rates") if before.get(part) != content[part]]
        if differing:
            raise ValueError(
                f"{output} holds a run of another recipe: {', '.join(differing)} of {kept} differ. Choose another "
                "training.output_dir, or remove the folder"
            )
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds files, but no run of a recipe: choose another training.output_dir")
    output.mkdir(parents=True, exist_ok=True)
    kept.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    only_prepare = argv[:1] == ["prepare"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="part.key=value, such as training.max_steps=100")
    parser.add_argument("--plan", action="store_true", help="print parameters, memory, disk, hours, licences and stop")
    parser.add_argument(
        "--card", type=float, metavar="GIB", help="for --plan: memory of another card than the one at hand"
    )
    arguments = parser.parse_args(argv[only_prepare:])
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    known = [known.name for known in fields(TrainingArguments) if known.init]
    check_names(recipe.training, known, f"{arguments.recipe}: training")
    defaults = {
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": not torch.accelerator.is_available(),
        "accelerator_config": {"even_batches": recipe.data.batch_seconds is None},  # it cannot even out those
    }
    args = TrainingArguments(**defaults | recipe.training)
    if arguments.plan:
        print(plan(recipe, args, arguments.card))
        return
    output = Path(args.output_dir)
    if not only_prepare and args.process_index == 0:
        claim_output(output, recipe)
    set_seed(args.seed)
    model, processor = load_model(recipe.model)
    model.eval().speech_model.to(args.device)  # the Trainer takes the rest there, whole or in pieces

    require_disk(recipe, model.config)

    def prepare_all(sources: list[Source]) -> list[PreparedClips | Texts]:
        sets = []
        for source in sources:
            if source.has_texts_alone:
                sets.append(Texts(source))
            else:
                paths = prepare(source, recipe.data, model, processor, Path(recipe.prepared))
                sets.append(PreparedClips(source, paths, recipe.data))
            print(sets[-1].report())
        return sets

    train, validation = prepare_all(recipe.data.train), prepare_all(recipe.data.validation)
    if only_prepare:
        return
    if recipe.data.live:
        pairs = zip(train, recipe.data.train, strict=True)
        train = [
            clips if source.has_texts_alone else LiveClips(clips, source, recipe.data, processor.feature_extractor)
            for clips, source in pairs
        ]
    train = mix(recipe.data.train, train)
    model.freeze_backbones()
    if args.device.type == "cpu":
        model.language_model.set_attn_implementation("eager")  # with a mask SDPA takes a fifth longer there
    for name, parameter in model.named_parameters():
        part = "fusion" if name.startswith("fusion.") else "text"
        parameter.requires_grad_(parameter.requires_grad and recipe.learning_rates.get(part) != 0)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in bfloat16 small updates would be rounded away
    print(*parameter_table(*count_parameters(model)), sep="\n")
    trainer = FusionTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(processor, recipe.data),
        processor=processor,
        recipe=recipe,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)
    if trainer.state.global_step < trainer.state.max_steps:
        print(f"Stopped by a signal after step {trainer.state.global_step}: the same command goes on from there")
        return
    metrics = trainer.evaluate()
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        model.save_pretrained(output, state_dict=weights)
        processor.save_pretrained(output)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
