import copy
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import assemble, tiny_speech_model, tiny_text_model
from safetensors.torch import load_file, save_file

from voxkrikri import VoxKrikriForConditionalGeneration, checkpoint_voxkrikri, modeling_voxkrikri


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
SELECTED_LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
CONTENTS = [
    pytest.param({}, {}, id="fusion"),
    pytest.param({"lora": LORA, "alignment_prior": True, "injection_layers": [1, 3]}, {}, id="lora"),
    pytest.param({"lora": SELECTED_LORA, "trained_text_modules": ["lm_head"]}, {}, id="lora-and-head"),
    pytest.param({"lora": LORA, "alignment": "text"}, {"tie_word_embeddings": True}, id="tied-head"),
    pytest.param(
        {"trained_text_modules": ["model.embed_tokens"]}, {"tie_word_embeddings": True}, id="trained-tied-head"
    ),
]
FORMS = pytest.mark.parametrize("light", [False, True], ids=["whole", "light"])
HUB_FILES = {
    f"{room}_voxkrikri.py"
    for room in (
        "configuration",
        "modeling",
        "alignment",
        "cache",
        "checkpoint",
        "generation",
        "greedy",
        "processing",
        "transcription",
        "pipeline",
    )
}


def stir(model) -> None:
    """Changes all that training would have changed, so that nothing trained equals what was assembled."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if model.is_trained(name):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def assemble_from_folders(tokenizers, folder: Path, text_changes: dict | None = None, **fusion):
    torch.manual_seed(1)
    tiny_speech_model(tokenizers.speech).save_pretrained(folder / "speech")
    tiny_text_model(tokenizers.text, **(text_changes or {})).save_pretrained(folder / "text")
    model = assemble(tokenizers, str(folder / "speech"), str(folder / "text"), **fusion)
    stir(model)
    return model


def assert_same(again, model, features) -> None:
    expected, state = model.state_dict(), again.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert not again.training
    text = {"input_ids": torch.tensor([[1, 2, 3, 4]] * 3), "text_positions": torch.tensor([[-1, 0, 1, 2]] * 3)}
    audio = {"input_features": features, "hypothesis_token_counts": torch.tensor([9, 20, 4])}
    assert torch.equal(again(**text, **audio).logits, model(**text, **audio).logits)
    for mode in ("full", "causal"):
        assert torch.equal(
            again.generate(**audio, fusion_mode=mode, max_new_tokens=5),
            model.generate(**audio, fusion_mode=mode, max_new_tokens=5),
        )


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# ---- saved = reloaded


@pytest.mark.parametrize(("fusion", "text_changes"), CONTENTS)
@FORMS
def test_reloaded_is_saved(tokenizers, features, tmp_path, fusion, text_changes, light):
    model = assemble_from_folders(tokenizers, tmp_path, text_changes, **fusion)
    model.save_pretrained(tmp_path / "saved", light=light)
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_same(again, model, features)
    assert again.config.light == light
    assert not model.config.light
    tied = again.language_model.get_input_embeddings().weight is again.language_model.lm_head.weight
    assert tied == text_changes.get("tie_word_embeddings", False)
    assert again.speech_model.generation_config.alignment_heads == [[1, 0], [1, 1], [1, 2]]
    again.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in (tmp_path / "saved").iterdir()
    )
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "again"), model, features)


def test_a_light_checkpoint_holds_what_was_trained_alone(tokenizers, tmp_path):
    model = assemble_from_folders(
        tokenizers, tmp_path, lora=LORA, trained_text_modules=["lm_head"], alignment_prior=True, light=True
    )
    model.save_pretrained(tmp_path / "light")
    assert [path.name for path in (tmp_path / "light").glob("*.safetensors*")] == ["model-fusion.safetensors"]
    tensors = load_file(tmp_path / "light" / "model-fusion.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert tensors.keys() == trained | {"speech_bytes", "text_bytes"}
    assert trained < model.state_dict().keys()


@FORMS
def test_files_of_a_checkpoint(tokenizers, tmp_path, light):
    model = assemble_from_folders(tokenizers, tmp_path, lora=LORA)
    model.save_pretrained(tmp_path / "saved", light=light)
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    parts = {"model-fusion.safetensors"}
    if not light:
        parts |= {"model-speech.safetensors", "model-text.safetensors", "model.safetensors.index.json"}
    assert files == HUB_FILES | {"config.json", "generation_config.json"} | parts
    assert "adapter_config.json" not in files  # it would make the Hub load the bare LLM
    for file in parts - {"model.safetensors.index.json"}:
        for name in load_file(tmp_path / "saved" / file):
            part = {"speech_model": "speech", "language_model": "text"}.get(name.split(".")[0], "fusion")
            assert file == f"model-{'fusion' if '.lora_' in name else part}.safetensors"
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["light"], config["lora"], config["architectures"]) == (light, LORA, [type(model).__name__])


def test_saving_over_another_form_leaves_no_stale_shard(tokenizers, features, tmp_path):
    model = assemble_from_folders(tokenizers, tmp_path)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("model-text-*-of-*.safetensors"))) > 1
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved"), model, features)
    model.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 3
    model.save_pretrained(tmp_path / "saved", light=True)
    assert len(list((tmp_path / "saved").glob("*.safetensors*"))) == 1
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved"), model, features)


def test_a_light_checkpoint_can_be_made_whole(tokenizers, features, tmp_path):
    model = assemble_from_folders(tokenizers, tmp_path, lora=LORA)
    model.save_pretrained(tmp_path / "light", light=True)
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "light")
    again.save_pretrained(tmp_path / "whole", light=False)
    shutil.rmtree(tmp_path / "speech")
    shutil.rmtree(tmp_path / "text")
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "whole"), model, features)


# ---- types


@FORMS
def test_the_type_in_the_configuration_is_what_loads(tokenizers, tmp_path, light):
    model = assemble_from_folders(tokenizers, tmp_path, lora=LORA).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", light=light)
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for folder in ("speech", "text"):
        file = tmp_path / folder / "model.safetensors"
        rewrite(file, lambda state: state.update({name: value.bfloat16() for name, value in state.items()}))
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    for (name, value), expected in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value.to(expected.dtype), expected), name
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}


@FORMS
def test_attention_can_be_chosen_when_loading(tokenizers, tmp_path, light):
    assemble_from_folders(tokenizers, tmp_path).save_pretrained(tmp_path / "saved", light=light)
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert again.language_model.config._attn_implementation == "eager"
    assert again.speech_model.config._attn_implementation == "eager"


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(lambda state: state.pop("fusion.0.k_proj.weight"), "fusion.0.k_proj.weight", id="missing"),
        pytest.param(
            lambda state: state.update({"fusion.7.k_proj.weight": torch.zeros(2)}),
            "fusion.7.k_proj.weight",
            id="extra",
        ),
        pytest.param(
            lambda state: state.update({"fusion.0.k_proj.weight": torch.zeros(31, 16)}),
            "fusion.0.k_proj.weight",
            id="misshapen",
        ),
    ],
)
@FORMS
def test_a_tensor_that_does_not_fit_is_named(tokenizers, tmp_path, change, name, light):
    assemble_from_folders(tokenizers, tmp_path).save_pretrained(tmp_path / "saved", light=light)
    rewrite(tmp_path / "saved" / "model-fusion.safetensors", change)
    with pytest.raises(ValueError, match=f"do not fit its config.json.*{name}"):
        VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved")


def test_a_backbones_missing_tensor_is_named(tokenizers, tmp_path):
    assemble(tokenizers).save_pretrained(tmp_path)
    rewrite(tmp_path / "model-text.safetensors", lambda state: state.pop("language_model.lm_head.weight"))
    with pytest.raises(ValueError, match="missing keys: .*language_model.lm_head.weight"):
        VoxKrikriForConditionalGeneration.from_pretrained(tmp_path)


def test_the_projects_own_root_is_refused(tokenizers, tmp_path):
    (tmp_path / "voxkrikri.py").touch()
    with pytest.raises(ValueError, match="own root"):
        assemble(tokenizers).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["voxkrikri.py"]


def test_light_needs_ids(tokenizers, tmp_path):
    with pytest.raises(ValueError, match="needs the backbones' ids"):
        assemble(tokenizers).save_pretrained(tmp_path / "saved", light=True)
    assert not (tmp_path / "saved").exists()


def test_a_killed_save_harms_nothing(tokenizers, features, tmp_path, monkeypatch):
    model = assemble(tokenizers)
    model.save_pretrained(tmp_path / "old")
    written = []

    def write_half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        written.append(path)
        if len(written) % 2 == 0:
            raise KeyboardInterrupt

    other = copy.deepcopy(model)
    stir(other)
    monkeypatch.setattr(checkpoint_voxkrikri, "save_file", write_half)
    for folder in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(tmp_path / folder)
    assert len(written) == 4
    assert not list((tmp_path / "new").glob("*.safetensors"))
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "old"), model, features)


# ---- without peft, and from the Hub's cache


@pytest.mark.parametrize("lora", [LORA, SELECTED_LORA], ids=["all-linear", "selected"])
def test_without_peft_the_answers_are_the_same(tokenizers, features, tmp_path, monkeypatch, lora):
    model = assemble_from_folders(tokenizers, tmp_path, lora=lora)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "light", light=True)
    monkeypatch.setattr(modeling_voxkrikri, "LoraConfig", None)
    for form in ("whole", "light"):
        again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / form)
        assert any(isinstance(module, modeling_voxkrikri.LoraLinear) for module in again.modules())
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        text = {"input_ids": torch.tensor([[1, 2, 3, 4]] * 3), "text_positions": torch.tensor([[-1, 0, 1, 2]] * 3)}
        logits = [each(input_features=features, **text).logits for each in (again, model)]
        torch.testing.assert_close(*logits)
        assert torch.equal(again.generate(features), model.generate(features))


def test_without_peft_a_new_adapter_changes_nothing(tokenizers, monkeypatch):
    monkeypatch.setattr(modeling_voxkrikri, "LoraConfig", None)
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    text = tiny_text_model(tokenizers.text)
    logits = text(ids).logits
    assert torch.equal(assemble(tokenizers, text=text, lora=LORA)(ids).logits, logits)


def test_without_peft_unknown_options_are_named(tokenizers, monkeypatch):
    monkeypatch.setattr(modeling_voxkrikri, "LoraConfig", None)
    with pytest.raises(ValueError, match="'use_rslora'.*pip install peft"):
        assemble(tokenizers, lora=LORA | {"use_rslora": True})


def test_backbones_from_the_hub_are_pinned_to_their_commit(tokenizers, features, tmp_path, monkeypatch):
    commits = {"speech": "a" * 40, "text": "b" * 40}
    for part, build in (("speech", tiny_speech_model), ("text", tiny_text_model)):
        repository = tmp_path / "cache" / f"models--someone--{part}"
        torch.manual_seed(0)
        build(getattr(tokenizers, part)).save_pretrained(repository / "snapshots" / commits[part])
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commits[part])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = assemble(tokenizers, "someone/speech", "someone/text", lora=LORA, light=True)
    assert (model.config.speech_model_id, model.config.speech_model_revision) == ("someone/speech", commits["speech"])
    assert (model.config.text_model_id, model.config.text_model_revision) == ("someone/text", commits["text"])
    model.save_pretrained(tmp_path / "light")
    for part in commits:  # the repositories go on
        (tmp_path / "cache" / f"models--someone--{part}" / "refs" / "main").write_text("c" * 40)
    assert_same(VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "light"), model, features)
