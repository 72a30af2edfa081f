"""A random tiny VoxKrikri, whole and saved: what every test stands on, made in a second, with no network."""

import json
import os
import shutil


os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor, WhisperForConditionalGeneration

import train
from recipes.mini.speech_model import build_config, build_generation_config
from recipes.mini.vocabularies import first_pieces, speech_tokenizer, text_tokenizer, train_bpe
from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor


SENTENCES = (
    "Η θάλασσα ήταν ήσυχη εκείνο το πρωί.",
    "Πότε θα έρθεις στο χωριό; Σε περιμένουμε όλοι.",
    "Οι σκύλοι γάβγιζαν ώς αργά τη νύχτα, κι ο φύλακας ξαγρυπνούσε.",
    "«Καλημέρα σας», είπε ο ταχυδρόμος και άφησε το γράμμα.",
)


def tiny_speech_model(tokenizer, **changes) -> WhisperForConditionalGeneration:
    """A random Whisper of one second's window; it writes until its 24 positions are full, as random ones do."""
    config = build_config(tokenizer)
    config.update(
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_source_positions": 50,
            "max_target_positions": 24,
            "init_std": 0.5,
            "apply_spec_augment": False,
        }
        | changes
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = build_generation_config(config, tokenizer)
    return model


def tiny_text_model(tokenizer, config_class=LlamaConfig, model_class=LlamaForCausalLM, **changes):
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | changes
    )
    return model_class(config).eval()


def assemble(tokenizers, speech=None, text=None, seed: int = 0, **fusion) -> VoxKrikriForConditionalGeneration:
    """A tiny model whose fusion already speaks up: V would start at zero."""
    torch.manual_seed(seed)
    model = VoxKrikriForConditionalGeneration.from_pretrained_backbones(
        speech or tiny_speech_model(tokenizers.speech),
        text or tiny_text_model(tokenizers.text),
        tokenizer=tokenizers.text,
        speech_tokenizer=tokenizers.speech,
        **fusion,
    )
    for fusion_layer in model.fusion:
        for projection in filter(None, (fusion_layer.v_proj, fusion_layer.copy_proj)):
            torch.nn.init.normal_(projection.weight, std=0.5)
    model.generation_config.max_new_tokens = 12
    return model.eval()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(SENTENCES), encoding="utf-8")
    vocabulary, merges = train_bpe([path], 380)
    return SimpleNamespace(
        speech=speech_tokenizer(*first_pieces(vocabulary, merges, 340)), text=text_tokenizer(vocabulary, merges)
    )


@pytest.fixture(scope="session")
def processor(tokenizers) -> VoxKrikriProcessor:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return VoxKrikriProcessor(extractor, tokenizers.text, tokenizers.speech)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizers, processor) -> SimpleNamespace:
    """`folder`, `model` and `processor` of one saved tiny checkpoint. Tests must not change them."""
    folder = Path(tmp_path_factory.mktemp("tiny"))
    model = assemble(tokenizers, alignment_prior=True, lora={"r": 2, "lora_alpha": 4, "target_modules": "all-linear"})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, processor=processor)


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """Three sounds of 0.4, 0.7 and 1 s at 16 kHz."""
    rng = np.random.default_rng(0)
    return [0.3 * rng.standard_normal(int(seconds * 16_000)).astype(np.float32) for seconds in (0.4, 0.7, 1.0)]


@pytest.fixture(scope="session")
def features(clips, processor) -> torch.Tensor:
    return processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tokenizers):
    """A folder with two backbones, a manifest of twelve clips (one too long for the window), and a recipe."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    speech, text = tiny_speech_model(tokenizers.speech), tiny_text_model(tokenizers.text)
    for part in (speech, tokenizers.speech, WhisperFeatureExtractor(feature_size=80, chunk_length=1)):
        part.save_pretrained(folder / "speech")
    for part in (text, tokenizers.text):
        part.save_pretrained(folder / "text")
    rng, lines = np.random.default_rng(0), []
    for index in range(12):
        seconds = 1.5 if index == 5 else rng.uniform(0.3, 0.9)
        soundfile.write(folder / f"{index}.flac", 0.3 * rng.standard_normal(int(16_000 * seconds)), 16_000)
        lines.append(json.dumps({"audio": f"{index}.flac", "text": SENTENCES[index % 4][:18]}, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = {"path": str(folder / "manifest.jsonl")}
    recipe = {
        "model": {
            "speech": str(folder / "speech"),
            "text": str(folder / "text"),
            "alignment": "text",
            "alignment_prior": True,
            "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
        },
        "data": {
            "train": [source],
            "validation": dict(source),
            "input_noise": 0.2,
            "max_characters_per_second": 100,
        },
        "prepared": str(folder / "prepared"),
        "learning_rates": {"fusion": 3.0e-3},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
            "learning_rate": 1.0e-3,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train.main([str(folder / "recipe.yaml")])
    return folder


def trained_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-fusion.safetensors")


def back_to_checkpoint(run: Path, step: int) -> None:
    """What a run that was killed after `step` has left: its recipe and that checkpoint."""
    for leftover in run.iterdir():
        if leftover.name not in (f"checkpoint-{step}", "recipe.yaml"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
