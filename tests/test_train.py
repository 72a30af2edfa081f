"""Training on twelve short sounds: the same run twice, cut off and resumed; what is heard once; what recipes refuse."""

import dataclasses
import json
import os
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import datasets
import pytest
import torch
from conftest import SENTENCES, back_to_checkpoint, tiny_text_model, trained_weights
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import train
from tools.parameters import paper_config
from training.data import LiveClips, PreparedClips, Texts, load_source, mix, prepare
from training.plan import build_on_meta, count_parameters, estimate_memory
from training.recipe import Source, read_recipe
from training.trainer import TRAINED_WEIGHTS, BudgetBatches, Collator, FusionTrainer, reference_prefix
from voxkrikri import VoxKrikriForConditionalGeneration


ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name not in ("sources", "launch"))


def prepared(workshop, recipe, model, processor) -> PreparedClips:
    paths = prepare(recipe.data.validation[0], recipe.data, model, processor, workshop / "prepared")
    return PreparedClips(recipe.data.validation[0], paths, recipe.data)


def test_a_run_leaves_a_model_that_loads_and_its_error_rates(workshop):
    model = VoxKrikriForConditionalGeneration.from_pretrained(workshop / "run")
    assert model.fusion[0].v_proj.weight.abs().max() > 0
    metrics = json.loads((workshop / "run" / "metrics.json").read_text())
    assert {"eval_loss", "eval_wer", "eval_wer_full", "eval_wer_causal", "eval_wer_hypothesis"} <= metrics.keys()


def test_only_fusion_and_lora_have_changed(workshop):
    model = VoxKrikriForConditionalGeneration.from_pretrained(workshop / "run")
    before = load_file(workshop / "text" / "model.safetensors")
    after = model.language_model.state_dict()
    for name, value in before.items():
        plain, adapted = name, name.replace(".weight", ".base_layer.weight")
        assert torch.equal(value, after[adapted if adapted in after else plain]), name
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)


def test_a_run_cut_off_and_resumed_is_the_run(workshop, tmp_path):
    shutil.copytree(workshop / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copy(workshop / "run" / "recipe.yaml", tmp_path / "run")
    train.main([str(workshop / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"])
    whole, resumed = trained_weights(workshop / "run"), trained_weights(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_backbones_in_bfloat16_train_in_float32(workshop, tokenizers, tmp_path):
    for part in (tiny_text_model(tokenizers.text).bfloat16(), tokenizers.text):
        part.save_pretrained(tmp_path / "text")
    overrides = [f"model.text={tmp_path / 'text'}", "training.bf16=true", "training.max_steps=2"]
    train.main([str(workshop / "recipe.yaml"), *overrides, f"training.output_dir={tmp_path / 'run'}"])
    kept = load_file(tmp_path / "run" / "checkpoint-2" / TRAINED_WEIGHTS)
    assert {value.dtype for value in kept.values()} == {torch.float32}
    model = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.language_model.get_input_embeddings().weight.dtype == model.fusion[0].v_proj.weight.dtype


def test_whisper_listens_once_and_long_clips_are_left_out(workshop, monkeypatch):
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    monkeypatch.setattr(model, "listen", None)  # to call it would fail
    clips = prepared(workshop, recipe, model, processor)
    assert len(clips) == 11 and clips.dropped == {"longer than Whisper's window of 1 s": 1}
    heard = model.eval().__class__.listen(model, processor(audio=str(workshop / "7.flac"), text="").input_features)
    place = [clip["audio"] for clip in clips.clips].index(str(workshop / "7.flac"))
    assert torch.equal(clips[place]["hypothesis_ids"], heard.hypothesis_ids[0])
    assert torch.allclose(clips[place]["audio_states"], heard.audio_states[0], atol=0.05)  # kept as bfloat16
    assert clips[place]["text"] == SENTENCES[3][:18]


def test_sampled_hypotheses_are_others_and_the_same_when_made_again(workshop, tmp_path):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.hypothesis_temperature=2"])
    model, processor = train.load_model(recipe.model)
    model.eval()

    def listen_in(folder, recipe) -> list[str]:
        torch.manual_seed(0 if folder == "again" else 1)
        paths = prepare(recipe.data.validation[0], recipe.data, model, processor, tmp_path / folder)
        return [clip["hypothesis"] for clip in PreparedClips(recipe.data.validation[0], paths, recipe.data).clips]

    sampled, greedy = listen_in("first", recipe), listen_in("first", read_recipe(workshop / "recipe.yaml", []))
    assert sampled == listen_in("again", recipe)
    assert sampled != greedy


def test_a_batch_is_the_same_whenever_it_is_drawn(workshop):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.input_noise=0.5"])
    model, processor = train.load_model(recipe.model)
    clips = prepared(workshop, recipe, model, processor)
    collate = Collator(processor, recipe.data)
    first, again = (collate([clips[index] for index in (0, 4, 7)]) for _ in range(2))
    assert first["fusion_mode"] == again["fusion_mode"]
    assert torch.equal(first["input_ids"], again["input_ids"])
    plain = processor(text=[clips[index]["text"] for index in (0, 4, 7)])
    assert torch.equal(first["labels"], plain["labels"])
    assert not torch.equal(first["input_ids"], plain["input_ids"])  # the noise
    modes = {collate([clips[index]])["fusion_mode"] for index in range(11)}
    assert modes == {"full", "causal"}


def test_the_first_stage_spells_out_the_hypothesis(workshop):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.target=hypothesis", "data.input_noise=0"])
    model, processor = train.load_model(recipe.model)
    clips = prepared(workshop, recipe, model, processor)
    labels = Collator(processor, recipe.data)([clips[2]])["labels"][0]
    assert processor.decode(labels[labels >= 0]) == processor.decode_hypothesis(clips[2]["hypothesis_ids"])


@pytest.mark.parametrize(
    ("hypothesis", "words", "expected"),
    [
        ("ο σκύλος γαβγίζει τη νύχτα", 3, "Ο σκύλος γάβγιζε"),
        ("ο σκύλος κοιμάται και γάβγιζε όλη τη νύχτα", 4, "Ο σκύλος"),  # two words that nobody said
        ("ο σκύλος τη νύχτα", 3, "Ο σκύλος γάβγιζε όλη τη"),  # two that were not heard
        ("ο σκύλος γάβγιζε όλη τη νύχτα", 0, ""),
        ("", 0, ""),
    ],
)
def test_a_prefix_of_the_hypothesis_stands_for_words_of_the_reference(hypothesis, words, expected):
    assert reference_prefix("Ο σκύλος γάβγιζε όλη τη νύχτα.", hypothesis, words) == expected


def test_a_cut_clip_has_fewer_states_and_no_end(workshop):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.prefix_share=1", "data.input_noise=0"])
    _, processor = train.load_model(recipe.model)
    ids = processor.speech_tokenizer(SENTENCES[0], add_special_tokens=False, return_tensors="pt").input_ids[0]
    item = {
        "seed": 0,
        "text": SENTENCES[0],
        "prompt": "",
        "hypothesis_ids": ids,
        "audio_states": torch.randn(len(ids) + 1, 16),
    }
    cuts = [Collator(processor, recipe.data)([item | {"seed": seed}]) for seed in range(20)]
    assert len({int(cut["state_lengths"]) for cut in cuts}) > 5
    for cut in cuts:
        labels = cut["labels"][0][cut["labels"][0] >= 0]
        if cut["state_lengths"] == len(ids) + 1:  # too little was heard for a word: left whole
            assert processor.decode(labels) == SENTENCES[0]
            continue
        assert processor.end_token_id not in labels and len(cut["audio_states"][0]) == cut["state_lengths"]
        heard = processor.decode_hypothesis(cut["hypothesis_ids"][0])
        text = processor.decode(labels)
        assert heard.startswith(text) and SENTENCES[0].startswith(text) and text.split()[-1] in SENTENCES[0].split()
        assert len(text.split()) in (len(heard.split()), len(heard.split()) - 1)


def test_the_ratio_is_off_by_no_more_than_its_jitter(workshop):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.ratio_jitter=0.3"])
    model, processor = train.load_model(recipe.model)
    clips = prepared(workshop, recipe, model, processor)
    counts = [
        int(Collator(processor, recipe.data)([clips[0] | {"seed": seed}])["hypothesis_token_counts"])
        for seed in range(30)
    ]
    exact = processor.hypothesis_token_counts([clips.clips[0]["hypothesis"]])[0]
    assert len(set(counts)) > 3 and all(abs(count - exact) <= 0.3 * exact + 0.5 for count in counts)


def test_correction_reads_the_hypothesis_and_hears_nothing(workshop, tmp_path):
    overrides = ["data.task=correction", "data.fusion_modes=[full]", f"training.output_dir={tmp_path / 'run'}"]
    train.main([str(workshop / "recipe.yaml"), *overrides])
    fused = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert fused.fusion[0].v_proj.weight.abs().max() == 0
    lora = [value for name, value in fused.named_parameters() if "lora_B" in name]
    assert max(value.abs().max() for value in lora) > 0


def test_an_earlier_run_can_be_gone_on_from_with_other_settings(workshop):
    model, _ = train.load_model({"init_from": str(workshop / "run"), "alignment_lookahead": 3})
    assert model.config.alignment_lookahead == 3
    assert torch.equal(model.fusion[0].q_proj.weight, trained_weights(workshop / "run")["fusion.0.q_proj.weight"])
    with pytest.raises(ValueError, match="model has no 'lookahead': did you mean 'alignment_lookahead'"):
        train.load_model({"init_from": str(workshop / "run"), "lookahead": 3})


def test_the_same_whisper_trained_further_takes_the_place_of_an_earlier_run_s(workshop, tmp_path):
    model, processor = train.load_model({"init_from": str(workshop / "run")})
    further = deepcopy(model.speech_model)
    with torch.no_grad():
        further.model.encoder.layer_norm.bias += 1
    further.save_pretrained(tmp_path / "further")
    processor.speech_tokenizer.save_pretrained(tmp_path / "further")
    settings = {"init_from": str(workshop / "run"), "speech": str(tmp_path / "further")}
    changed, _ = train.load_model(settings)
    changed.save_pretrained(tmp_path / "changed")
    before = model.state_dict()
    after = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "changed").state_dict()
    differing = [name for name in before if not torch.equal(before[name], after[name])]
    assert differing == ["speech_model.model.encoder.layer_norm.bias"]
    with pytest.raises(ValueError, match="has an LLM: leave model.text"):
        train.load_model(settings | {"text": "another"})
    processor.speech_tokenizer.add_tokens(["another piece"])
    processor.speech_tokenizer.save_pretrained(tmp_path / "further")
    with pytest.raises(ValueError, match="another vocabulary"):
        train.load_model(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.max_steps=3", "the recipe has no 'trainin': did you mean 'training'"),
        ("data.targets=reference", "data has no 'targets': did you mean 'target'"),
        ("data.target=both", "data.target is one of"),
        ("data.task=translation", "data.task is one of"),
        ("data.validation.dataset=google/fleurs", "data.validation is either a path or a dataset"),
        ("training.max_steps", "an override is part.key=value"),
    ],
)
def test_a_recipe_that_says_something_unknown_is_refused(workshop, override, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(workshop / "recipe.yaml", [override])


def test_a_manifest_without_the_named_column_lists_those_it_has(workshop):
    source = Source(path=str(workshop / "manifest.jsonl"), text="transcription")
    with pytest.raises(ValueError, match=r"no column 'transcription', only \['audio', 'text'\]"):
        load_source(source)


def test_a_preset_is_a_source_and_the_recipe_wins(workshop, tmp_path):
    shutil.copytree(workshop, tmp_path / "clips", ignore=lambda folder, names: [n for n in names if ".flac" not in n])
    table = "client_id\tpath\tsentence\n" + "".join(f'ab\t{index}.flac\t"Ναι {index}\n' for index in range(3))
    (tmp_path / "train.tsv").write_text(table, encoding="utf-8")
    validation = f"data.validation={{preset: common_voice_el, path: {tmp_path / 'train.tsv'}}}"
    recipe = read_recipe(workshop / "recipe.yaml", ["data.train=[{preset: fleurs_el, split: test}]", validation])
    fleurs = recipe.data.train[0]
    assert (fleurs.dataset, fleurs.config, fleurs.text, fleurs.split) == (
        "google/fleurs",
        "el_gr",
        "raw_transcription",
        "test",
    )
    model, processor = train.load_model(recipe.model)
    paths = prepare(recipe.data.validation[0], recipe.data, model, processor, tmp_path / "prepared")
    clips = PreparedClips(recipe.data.validation[0], paths, recipe.data)
    assert [clip["text"] for clip in clips.clips] == [f'"Ναι {index}' for index in range(3)]
    with pytest.raises(ValueError, match="recipes/sources has no 'fleurs_gr': did you mean 'fleurs_el'"):
        read_recipe(workshop / "recipe.yaml", ["data.train=[{preset: fleurs_gr}]"])


def test_a_bad_line_of_a_manifest_is_named(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"audio": "a.wav", "text": "α"}\n{"audio": "b.wav", "text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="manifest.jsonl, line 2 is not JSON"):
        load_source(Source(path=str(manifest)))


def write_manifest(workshop, folder, count: int, **changes) -> Source:
    """The first clips of the workshop's manifest; `changes` are entries (by index) that replace some."""
    lines = [json.loads(line) for line in (workshop / "manifest.jsonl").open(encoding="utf-8")][:count]
    lines = [line | {"audio": str(workshop / line["audio"])} for line in lines]
    for index, change in changes.items():
        lines[int(index.removeprefix("clip_"))] |= change
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return Source(path=str(path))


def test_clips_that_cannot_serve_are_left_out_and_counted_by_reason(workshop, tmp_path):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.max_unreadable_share=0.2"])
    model, processor = train.load_model(recipe.model)
    (tmp_path / "notes.flac").write_text("no audio")
    source = write_manifest(
        workshop,
        tmp_path,
        8,
        clip_0={"text": SENTENCES[2] * 9},
        clip_1={"text": " "},
        clip_2={"audio": str(tmp_path / "notes.flac")},
    )
    paths = prepare(source, recipe.data, model, processor, tmp_path / "prepared")
    clips = PreparedClips(source, paths, recipe.data)
    assert len(clips) == 4 and sorted(clips.dropped.values()) == [1, 1, 1, 1]
    for reason in ("characters a second", "without a text", "unreadable", "longer than Whisper's window"):
        assert reason in clips.report()
    recipe.data.keep_empty_text = True
    assert len(PreparedClips(source, paths, recipe.data)) == 5
    recipe.data.max_unreadable_share = 0.1
    with pytest.raises(ValueError, match="1 of the 8 clips of .* cannot be read.*notes.flac"):
        PreparedClips(source, paths, recipe.data)


def test_in_batches_of_like_length_every_clip_keeps_its_own_states(workshop, tmp_path):
    recipe = read_recipe(workshop / "recipe.yaml", ["data.listen_batch_size=2", "data.max_unreadable_share=0.3"])
    model, processor = train.load_model(recipe.model)
    model.eval()
    (tmp_path / "notes.flac").write_text("no audio")
    texts = {"clip_0": {"text": SENTENCES[1]}, "clip_2": {"text": "Ναι."}, "clip_4": {"text": SENTENCES[0]}}
    source = write_manifest(workshop, tmp_path, 5, clip_3={"audio": str(tmp_path / "notes.flac")}, **texts)
    paths = prepare(source, recipe.data, model, processor, tmp_path / "prepared")
    clips = PreparedClips(source, paths, recipe.data)
    assert [clip["audio"] for clip in clips.clips] == [str(workshop / f"{index}.flac") for index in (0, 1, 2, 4)]
    for clip, item in zip(clips.clips, (clips[index] for index in range(4)), strict=True):
        alone = model.listen(processor(audio=clip["audio"]).input_features, recipe.data.language)
        assert torch.equal(item["hypothesis_ids"], alone.hypothesis_ids[0]) and item["text"] == clip["text"]
        assert torch.allclose(item["audio_states"], alone.audio_states[0], atol=0.05)  # kept as bfloat16


def test_a_manifest_that_grows_is_not_heard_again(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.CLIPS_PER_SHARD", 3)
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    first = prepare(write_manifest(workshop, tmp_path, 6), recipe.data, model, processor, tmp_path / "prepared")
    again = prepare(write_manifest(workshop, tmp_path, 8), recipe.data, model, processor, tmp_path / "prepared")
    assert first == again[:2] and len(again) == 3
    changed = prepare(
        write_manifest(workshop, tmp_path, 6, clip_4={"text": "άλλο"}),
        recipe.data,
        model,
        processor,
        tmp_path / "prepared",
    )
    assert changed[0] == first[0] and changed[1] != first[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gives_what_its_manifest_gives(workshop, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("training.data.CLIPS_PER_SHARD", 5)
    entries = [json.loads(line) for line in (workshop / "manifest.jsonl").open(encoding="utf-8")]
    rows = {
        "sound": [{"bytes": (workshop / entry["audio"]).read_bytes(), "path": entry["audio"]} for entry in entries],
        "words": [entry["text"] for entry in entries],
    }
    (tmp_path / "clips").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "clips" / "train.parquet")
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    source = Source(dataset=str(tmp_path / "clips"), audio="sound", text="words", streaming=streaming)
    for _ in range(2):  # made, then found
        paths = prepare(source, recipe.data, model, processor, tmp_path / "prepared")
        clips, same = PreparedClips(source, paths, recipe.data), prepared(workshop, recipe, model, processor)
        assert len(paths) == 3 and clips.dropped == same.dropped
        for index in range(len(same)):
            assert torch.equal(clips[index]["audio_states"], same[index]["audio_states"])
            assert clips[index]["text"] == same[index]["text"]


def test_sources_are_mixed_by_weight_and_hours(workshop):
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    clips = prepared(workshop, recipe, model, processor)
    assert len(mix([Source(path="x"), Source(path="x", weight=2.5)], [clips, clips])) == 11 + 22 + 6
    seconds = sum(clip["seconds"] for clip in clips.clips)
    half = mix([Source(path="x", hours=seconds / 7200)], [clips])
    assert 0 < len(half) < 11
    texts = [item["seed"] for item in half]
    assert len(set(texts)) == len(texts) and texts == [
        item["seed"] for item in mix([Source(path="x", hours=seconds / 7200)], [clips])
    ]


@pytest.mark.parametrize("processes", [1, 3])
def test_batches_fill_a_budget_and_hold_every_clip(processes):
    seconds = [1 + 29 * ((7 * index) % 100) / 100 for index in range(200)]
    sampler = BudgetBatches(seconds, 60, processes)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] and len(epochs[-1]) == len(sampler) and len(sampler) % processes == 0
        assert {index for batch in epochs[-1] for index in batch} == set(range(200))
        assert all(len(batch) * max(seconds[index] for index in batch) <= 60 for batch in epochs[-1])
        padded = sum(len(batch) * max(seconds[index] for index in batch) for batch in epochs[-1])
        assert padded < 1.2 * sum(seconds)
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="batch_seconds is 20, and the longest clip has 29.7 s"):
        BudgetBatches(seconds, 20)


def test_a_signal_saves_and_the_run_goes_on_exactly(workshop, tmp_path, monkeypatch, capsys):
    run = [str(workshop / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"]
    steps = []

    def step_and_signal(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return Trainer.training_step(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "training_step", step_and_signal, raising=False)
    train.main(run)
    assert "Stopped by a signal after step 3" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and not (tmp_path / "run" / "metrics.json").exists()
    train.main(run)
    assert steps == [0, 1, 2, 3]
    for name, value in trained_weights(tmp_path / "run").items():
        assert torch.equal(value, trained_weights(workshop / "run")[name]), name


def test_live_clips_unchanged_give_the_losses_of_prepared_ones(workshop, tmp_path):
    common = ["data.input_noise=0", "model.lora.lora_dropout=0", "training.logging_steps=1", "training.max_steps=2"]
    unchanged = ["data.live=true", "data.speeds=[1]", "data.masked_frames=0", "data.masked_mels=0"]
    losses = []
    for name, overrides in (("prepared", []), ("live", unchanged)):
        output = tmp_path / name
        train.main([str(workshop / "recipe.yaml"), *common, *overrides, f"training.output_dir={output}"])
        state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
        logged = [entry for entry in state["log_history"] if "loss" in entry]
        losses.append([entry["loss"] for entry in logged])
        assert "audio_hours_per_hour" not in logged[0] and logged[1]["audio_hours_per_hour"] > 0
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-3)  # those on disk are bfloat16


@pytest.mark.parametrize("changes", [{"speeds": [0.9]}, {"masked_frames": 0.3}, {"masked_mels": 0.3}], ids=str)
def test_live_clips_change_what_whisper_hears(workshop, changes):
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    clips, source = prepared(workshop, recipe, model, processor), recipe.data.validation[0]
    features = []
    for settings in ({}, changes):
        settings = {"speeds": [1.0], "masked_frames": 0, "masked_mels": 0} | settings
        data = dataclasses.replace(recipe.data, **settings)
        torch.manual_seed(3)
        features.append(LiveClips(clips, source, data, processor.feature_extractor)[7]["input_features"])
    plain = processor(audio=clips.clips[7]["audio"]).input_features[0]
    assert torch.equal(features[0], plain) and not torch.equal(features[1], plain)


def test_a_run_in_batches_of_seconds_is_resumed_exactly(workshop, tmp_path):
    overrides = ["data.batch_seconds=3", "data.loss_chunk_size=7", f"training.output_dir={tmp_path / 'run'}"]
    train.main([str(workshop / "recipe.yaml"), *overrides])
    whole = trained_weights(tmp_path / "run")
    back_to_checkpoint(tmp_path / "run", 2)
    train.main([str(workshop / "recipe.yaml"), *overrides])
    for name, value in trained_weights(tmp_path / "run").items():
        assert torch.equal(value, whole[name]), name


def test_lora_may_be_added_after_a_first_stage(workshop, tmp_path):
    overrides = ["model.lora=null", "training.max_steps=2", f"training.output_dir={tmp_path / 'run'}"]
    train.main([str(workshop / "recipe.yaml"), *overrides])
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    plain, _ = train.load_model({"init_from": str(tmp_path / "run")})
    adapted, _ = train.load_model({"init_from": str(tmp_path / "run"), "lora": lora})
    ids = torch.arange(5, 12)[None]
    assert torch.equal(plain(input_ids=ids).logits, adapted(input_ids=ids).logits)
    adapted.save_pretrained(tmp_path / "adapted")
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "adapted")
    assert again.config.lora == lora and any("lora_B" in name for name, _ in again.named_parameters())


def test_a_folder_with_another_run_is_refused(workshop, tmp_path):
    with pytest.raises(ValueError, match="another recipe: data of .*recipe.yaml differ"):
        train.main([str(workshop / "recipe.yaml"), "data.input_noise=0.3"])
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run of a recipe"):
        train.main([str(workshop / "recipe.yaml"), f"training.output_dir={tmp_path}"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    recipe = read_recipe(path, [])
    assert not set(recipe.training) - {known.name for known in dataclasses.fields(TrainingArguments)}
    train.check_names(recipe.model, train.model_settings(), "model")


def test_the_plan_tells_what_a_run_will_need_and_makes_nothing(workshop, tmp_path, capsys):
    run = [
        str(workshop / "recipe.yaml"),
        f"training.output_dir={tmp_path / 'run'}",
        f"prepared={tmp_path / 'prepared'}",
    ]
    model, _ = train.load_model(read_recipe(workshop / "recipe.yaml", []).model)
    train.main([*run, "--plan", "--card", "24"])
    text = capsys.readouterr().out
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    assert f"{share:.2%}" in text and "fits a card of 24 GiB" in text
    assert f"licence   LLM: {workshop / 'text'}: no card" in text
    assert not (tmp_path / "run").exists() and not (tmp_path / "prepared").exists()
    train.main([*run, "--plan", "--card", "0.5"])
    assert "does not fit a card of 0 GiB" in capsys.readouterr().out


def test_the_plan_of_the_papers_model_on_a_24_gib_card():
    config = paper_config()
    counts = count_parameters(build_on_meta(config))
    args = TrainingArguments(per_device_train_batch_size=8, bf16=True, gradient_checkpointing=True, use_cpu=True)
    memory = estimate_memory(config, args, {"dtype": "bfloat16"}, *counts)
    assert memory["weights"] == 2 * (counts[0].total() - counts[1].total())
    assert memory["trained weights, gradients and Adam (float32)"] == 16 * counts[1].total()
    four_bits = estimate_memory(
        config, args, {"dtype": "bfloat16", "text_kwargs": {"quantization_config": {}}}, *counts
    )
    assert four_bits["weights"] < 0.5 * memory["weights"]


@pytest.fixture
def archive(tmp_path):
    """Texts without audio: plain lines, one of them long, and tasks with a question to each answer."""
    lines = [SENTENCES[0], "", SENTENCES[1], " ".join([SENTENCES[2]] * 40)]
    (tmp_path / "archive.txt").write_text("\n".join(lines), encoding="utf-8")
    tasks = [{"question": "Πότε;", "answer": "Χθες."}, {"question": "Πού;", "answer": "Εκεί."}]
    lines = [json.dumps(task, ensure_ascii=False) for task in tasks]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_texts_alone_come_line_by_line_and_with_their_prompts(archive):
    lines = Texts(Source(path=str(archive / "archive.txt")))
    assert [lines[0]["text"], lines[1]["text"]] == list(SENTENCES[:2]) and len(lines) > 3
    assert " ".join(clip["text"] for clip in lines.clips[2:]) == " ".join([SENTENCES[2]] * 40)
    options = {"path": str(archive / "tasks.jsonl"), "audio": None, "text": "answer"}
    tasks = Texts(Source(**options, prompt="Ερώτηση: {question}"))
    assert tasks[1] == {"seed": 1, "text": "Εκεί.", "prompt": "Ερώτηση: Πού;"}
    with pytest.raises(ValueError, match="asks for 'query', which is no column"):
        Texts(Source(**options, prompt="{query}"))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_texts_alone_beside_clips_hear_nothing(workshop, archive, chunk_size):
    """A mixed batch has the losses of its clips and of the plain LLM on its texts."""
    recipe = read_recipe(
        workshop / "recipe.yaml", ["data.input_noise=0", f"data.loss_chunk_size={chunk_size or 'null'}"]
    )
    model, processor = train.load_model(recipe.model | {"alignment_prior": False})
    for fusion in model.eval().fusion:
        torch.nn.init.normal_(fusion.v_proj.weight)
    clips, texts = prepared(workshop, recipe, model, processor), Texts(Source(path=str(archive / "archive.txt")))
    collate = Collator(processor, recipe.data)

    def total_loss(items: list[dict]) -> torch.Tensor:
        batch = collate(items) | ({"fusion_mode": "full"} if "audio_states" in items[0] else {})
        return model(**batch, num_items_in_batch=1).loss

    both = total_loss([clips[0], texts[0], clips[1]])
    torch.testing.assert_close(both, total_loss([clips[0], clips[1]]) + total_loss([texts[0]]))
    plain = dict(processor(text=SENTENCES[0]))
    torch.testing.assert_close(total_loss([texts[0]]), model.language_model(**plain, num_items_in_batch=1).loss)


def test_an_archive_of_text_adapts_the_llm_and_leaves_the_fusion(workshop, archive, tmp_path):
    output = tmp_path / "adapted"
    overrides = [
        f"data.train=[{{path: {archive / 'archive.txt'}}}]",
        f"data.validation=[{{path: {workshop / 'manifest.jsonl'}}}, {{path: {archive / 'archive.txt'}}}]",
        "learning_rates.fusion=0",
        f"model={{init_from: {workshop / 'run'}}}",
        f"training.output_dir={output}",
    ]
    train.main([str(workshop / "recipe.yaml"), *overrides])
    before, after = trained_weights(workshop / "run"), trained_weights(output)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("lora_" in name for name in changed)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_archive_perplexity"] > 1
    workshop_set = f"eval_{workshop.name}"
    assert metrics["eval_wer"] == metrics[f"{workshop_set}_wer"]
    assert metrics["eval_loss"] == pytest.approx((metrics[f"{workshop_set}_loss"] + metrics["eval_archive_loss"]) / 2)


def test_a_source_has_its_own_language_and_prompt(workshop, tmp_path):
    recipe = read_recipe(workshop / "recipe.yaml", [])
    model, processor = train.load_model(recipe.model)
    source = dataclasses.replace(recipe.data.train[0], prompt="Μετάφραση:")
    clips = PreparedClips(source, prepare(source, recipe.data, model, processor, workshop / "prepared"), recipe.data)
    batch = Collator(processor, recipe.data)([clips[0], clips[1]])
    prompt = processor(prompt="Μετάφραση:")["input_ids"][0]
    assert torch.equal(batch["input_ids"][:, : len(prompt)], prompt.expand(2, -1))
    assert (batch["labels"][:, : len(prompt)] == -100).all()
    with pytest.raises(ValueError, match="language 'xx' was given|language 'xx' is unknown"):
        foreign = dataclasses.replace(source, language="xx")
        prepare(foreign, recipe.data, model, processor, tmp_path / "prepared")


def test_a_full_disk_is_seen_before_anything_is_made(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    run = [f"training.output_dir={tmp_path / 'run'}", f"prepared={tmp_path / 'prepared'}"]
    with pytest.raises(ValueError, match="GB are free there: set `prepared`"):
        train.main(["prepare", str(workshop / "recipe.yaml"), *run])
    assert not (tmp_path / "prepared").exists()


def test_the_projects_own_root_is_no_output(workshop, tmp_path):
    (tmp_path / "voxkrikri.py").touch()
    with pytest.raises(ValueError, match="project's own root"):
        train.main([str(workshop / "recipe.yaml"), f"training.output_dir={tmp_path}"])


def test_check_real_trains_and_scores_five_rows(workshop, tmp_path):
    from tools import check_real

    for split in ("train", "validation", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        lines = (workshop / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) | {"duration": 0.9} for index, line in enumerate(lines) if index != 5]
        for entry in entries:
            shutil.copy(workshop / entry["audio"], folder)
        manifest = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        (folder / "manifest.jsonl").write_text(manifest + "\n", encoding="utf-8")
    backbones = [f"model.speech={workshop / 'speech'}", f"model.text={workshop / 'text'}"]
    quick = [
        "training.max_steps=2",
        "training.dataloader_drop_last=true",
        "training.save_strategy='no'",
        "training.use_cpu=true",
    ]
    check_real.run(tmp_path, [*backbones, *quick], ["--steps", "2", "--batch-size", "4", "--save-steps", "2"])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["clips"] == 11
    assert [row["row"][0] for row in results["rows"]] == ["1", "2", "3", "4", "5", "5", "6"]
    assert all(0 < row["wer"]["low"] <= row["wer"]["value"] <= row["wer"]["high"] for row in results["rows"])
    texts = [json.loads(line) for line in (tmp_path / "results" / "texts.jsonl").open(encoding="utf-8")]
    assert len(texts) == 11 and {"reference", "1 Whisper", "4 VoxKrikri, full"} <= texts[0].keys()
    assert (tmp_path / "results" / "results.png").stat().st_size > 1_000
