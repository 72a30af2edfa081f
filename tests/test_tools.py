"""The tools by themselves; `evaluate` and `check_real` are tested on the runs of test_train.py."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard, RepoCard

from tools import publish, review
from tools.parameters import paper_config, table
from training.data import load_source
from training.plan import build_on_meta, count_parameters
from training.recipe import Source


def test_parameters_of_the_papers_model():
    counts, trained = count_parameters(build_on_meta(paper_config()))
    backbones = counts.total() - counts["LoRA"] - counts["fusion"]
    assert round(backbones / 1e9, 3) == 9.746
    assert counts["the LLM's head"] == 149_248 * 4096 == 611_319_808
    assert counts["LoRA"] == 20_971_520
    assert counts["fusion"] == 4096 * 4096 + 2 * 1280 * 4096 == 27_262_976
    assert trained.total() == counts["LoRA"] + counts["fusion"]
    lines = table(counts).splitlines()
    assert lines[-2].endswith("unexplained 695.8 M")
    assert lines[-1].endswith("unexplained 84.4 M")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_count_a_tied_head_once(tied):
    config = paper_config()
    config.text_config.tie_word_embeddings = tied
    assert count_parameters(build_on_meta(config))[0]["the LLM's head"] == (0 if tied else 149_248 * 4096)


RESULTS = {
    "data": "interviews",
    "clips": 3,
    "rows": [
        {"row": "1 Whisper", "wer": {"value": 0.4}},
        {"row": "4 VoxKrikri, full", "wer": {"value": 0.3}},
    ],
}


def stage(tiny, out, *more: str) -> None:
    publish.main([str(tiny.folder), "--repo", "us/tiny", "--license", "cc-by-sa-4.0", "--out", str(out), *more])


def test_publish_stages_a_repository_that_loads_and_a_space(tiny, tmp_path, capsys):
    results = tmp_path / "results" / "results.json"
    results.parent.mkdir()
    results.write_text(json.dumps(RESULTS), encoding="utf-8")
    results.with_suffix(".md").write_text("| row | WER |\n", encoding="utf-8")
    stage(tiny, tmp_path / "out", "--space", "us/page", "--results", str(results))
    assert "Nothing was uploaded" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert (card.data.license, card.data.language) == ("cc-by-sa-4.0", ["el"])
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("interviews", "wer", 30.0)
    assert "| row | WER |" in card.text and "Llama" not in card.text
    page = RepoCard.load(tmp_path / "out" / "space" / "README.md").data
    assert (page.sdk, page.app_file, page.models) == ("gradio", "app.py", ["us/tiny"])
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "model-fusion.safetensors", "pipeline_voxkrikri.py", "speech_tokenizer"} <= names
    with pytest.raises(SystemExit):
        stage(tiny, tmp_path / "out")
    assert "add --upload to send" in capsys.readouterr().err


def test_publish_gives_llama_its_name_and_notice(tiny, tmp_path):
    config = json.loads((tiny.folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.folder, checkpoint)
    config["text_model_id"] = "meta-llama/Llama-3.1-8B"
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    common = [str(checkpoint), "--license", "llama3.1"]
    with pytest.raises(ValueError, match="begins with Llama"):
        publish.main([*common, "--repo", "us/tiny", "--out", str(tmp_path / "refused")])
    publish.main([*common, "--repo", "us/Llama-VoxKrikri", "--out", str(tmp_path / "out")])
    assert "Built with Llama" in (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "Llama 3.1 Community License" in (tmp_path / "out" / "model" / "NOTICE").read_text(encoding="utf-8")


def test_only_reviewed_clips_are_trained_on(tiny, tmp_path):
    rng = np.random.default_rng(0)
    recording = 0.1 * rng.standard_normal(40_000).astype(np.float32)
    soundfile.write(tmp_path / "talk.wav", recording, 16_000)
    arguments = [str(tmp_path / "talk.wav"), "--model", str(tiny.folder), "--out", str(tmp_path / "review")]
    review.main(arguments)
    manifest = tmp_path / "review" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    clips = {line["audio"]: soundfile.read(tmp_path / "review" / line["audio"])[0] for line in lines}
    assert len(lines) > 2  # the tiny Whisper hears one second at once
    np.testing.assert_allclose(np.concatenate([clips[name] for name in sorted(clips)]), recording, atol=1e-4)
    assert [line["confidence"] for line in lines] == sorted(line["confidence"] for line in lines)
    with pytest.raises(ValueError, match="is reviewed: set"):
        load_source(Source(path=str(manifest)))
    lines[1] |= {"text": "Καλημέρα.", "reviewed": True}
    manifest.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert load_source(Source(path=str(manifest))).to_list() == [{"audio": lines[1]["audio"], "text": "Καλημέρα."}]
    with pytest.raises(SystemExit):
        review.main(arguments)
