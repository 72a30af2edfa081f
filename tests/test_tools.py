"""The tools by themselves; `evaluate` and `check_real` are tested on the runs of test_train.py."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard, RepoCard

from tools import publish
from tools.parameters import paper_config, table
from training.plan import build_on_meta, count_parameters


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
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("wer", 30.0)]
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
