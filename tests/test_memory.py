"""Parts quantised, placed and brought one by one, and yet the same model."""

import copy
import json

import pytest
import torch
from conftest import assemble, tiny_speech_model, tiny_text_model
from transformers import AutoModel, BitsAndBytesConfig
from transformers.integrations.accelerate import _get_device_map

from benchmarks import memory, training
from voxkrikri import VoxKrikriConfig, VoxKrikriForConditionalGeneration


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
FUSION = {"alignment": "text", "alignment_prior": True, "copy_hypothesis": True, "injection_layers": [1, 3]}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMS = pytest.mark.parametrize("light", [False, True], ids=["whole", "light"])
LAYERS = "language_model.model.layers"


@pytest.fixture(scope="module")
def folders(tokenizers, tmp_path_factory):
    """A model saved in both forms: `whole` and `light`."""
    folder = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    tiny_speech_model(tokenizers.speech).save_pretrained(folder / "speech")
    tiny_text_model(tokenizers.text, hidden_size=64).save_pretrained(folder / "text")  # a block of 4 bits is 64 wide
    parts = str(folder / "speech"), str(folder / "text")
    model = assemble(tokenizers, *parts, lora=LORA, trained_text_modules=["model.layers.0.mlp"], **FUSION)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for form in ("whole", "light"):
        model.save_pretrained(folder / form, light=form == "light")
    return folder


# ---- four bits


def quantised(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if type(parameter).__name__ == "Params4bit"}


@FORMS
@pytest.mark.parametrize("skipped", [None, ["model.layers.1", "o_proj"]], ids=["all", "but-some"])
def test_only_the_frozen_linears_of_the_llm_are_quantised(folders, features, light, skipped):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = BitsAndBytesConfig(**FOUR_BITS, llm_int8_skip_modules=skipped)
    model = VoxKrikriForConditionalGeneration.from_pretrained(
        folders / ("light" if light else "whole"), quantization_config=given
    )
    expected = {f"{LAYERS}.{layer}.mlp.{name}_proj" for layer in (1, 2) for name in ("gate", "up", "down")}
    expected |= {f"{LAYERS}.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkvo"}
    if skipped:
        expected = {name for name in expected if ".layers.1." not in name and not name.endswith("o_proj")}
    assert quantised(model) == {f"{name}.base_layer.weight" for name in expected}
    assert given.llm_int8_skip_modules == skipped
    full = VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole")
    name = f"{LAYERS}.2.mlp.up_proj.base_layer.weight"
    weight, exact = model.get_parameter(name), full.get_parameter(name)
    error = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state) - exact
    assert 0.01 < error.norm() / exact.norm() < 0.15
    assert not torch.equal(model.generate(features), full.generate(features))


@FORMS
def test_quantised_alone_or_inside_is_the_same(tokenizers, folders, features, light, tmp_path):
    pytest.importorskip("bitsandbytes")
    skipped = {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}  # as it is trained
    model = assemble(
        tokenizers,
        str(folders / "speech"),
        str(folders / "text"),
        lora=LORA,
        text_kwargs={"quantization_config": BitsAndBytesConfig(**FOUR_BITS, **skipped)},
        **FUSION,
    )
    model.save_pretrained(tmp_path / "saved", light=light)  # before it runs: on a CPU that changes the scales
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    assert ("quantization_config" in config) != light
    again = VoxKrikriForConditionalGeneration.from_pretrained(
        tmp_path / "saved", quantization_config=BitsAndBytesConfig(**FOUR_BITS, **skipped) if light else None
    )
    state = again.state_dict()
    assert quantised(again) == quantised(model) != set()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if not light:  # and once more, from the state of the whole
        again.save_pretrained(tmp_path / "again")
        again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(features), model.generate(features))


@FORMS
def test_a_model_of_four_bits_is_saved_in_either_form(folders, light, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = AutoModel.from_pretrained(
        folders / ("light" if light else "whole"), trust_remote_code=True, quantization_config=FOUR_BITS
    )
    model.save_pretrained(tmp_path / "light", light=True)
    full = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "light")  # the reader says how
    full.save_pretrained(tmp_path / "full", light=False)
    model.save_pretrained(tmp_path / "whole", light=False)
    for form, is_quantised in (("light", False), ("full", False), ("whole", True)):
        assert ("quantization_config" in (tmp_path / form / "config.json").read_text()) == is_quantised
        again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / form)
        assert bool(quantised(again)) == is_quantised
        state = again.state_dict()
        expected = (model if is_quantised else full).state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_quantisation_that_cannot_leave_anything_out_is_named(folders):
    with pytest.raises(ValueError, match="EetqConfig"):
        VoxKrikriForConditionalGeneration.from_pretrained(
            folders / "whole", quantization_config={"quant_method": "eetq"}
        )


def test_an_llm_that_was_trained_whole_is_not_quantised(folders):
    config = VoxKrikriConfig.from_pretrained(folders / "whole")
    config.trained_text_modules = ["model"]
    with pytest.raises(ValueError, match="all of it was trained .model."):
        VoxKrikriForConditionalGeneration.from_pretrained(
            folders / "whole",
            config=config,
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        )


# ---- dtypes


@FORMS
def test_whisper_has_a_dtype_of_its_own(folders, features, light, tmp_path):
    folder = folders / ("light" if light else "whole")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, speech_dtype="float32")
    for _ in range(2):
        assert {value.dtype for value in model.speech_model.parameters()} == {torch.float32}
        assert {value.dtype for value in model.language_model.parameters()} == {torch.bfloat16}
        assert {value.dtype for value in model.fusion.parameters()} == {torch.bfloat16}
        assert model.generate(features).shape[0] == 3
        model.save_pretrained(tmp_path / "saved")
        model = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(
        model.listen(features).audio_states,
        VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole").listen(features).audio_states,
    )


# ---- devices


PIECES = {
    "speech_model.model.encoder": "disk",
    "speech_model.model.decoder": "cpu",
    "speech_model.proj_out": "cpu",
    "language_model.model.embed_tokens": "cpu",
    f"{LAYERS}.0": "cpu",
    f"{LAYERS}.1": "disk",
    f"{LAYERS}.2": "disk",
    "language_model.model.norm": "cpu",
    "language_model.model.rotary_emb": "cpu",
    "language_model.lm_head": "disk",
}


@pytest.mark.parametrize(
    ("device_map", "fusion"),
    [
        pytest.param("cpu", ["cpu", "cpu"], id="device"),
        pytest.param("auto", ["cpu", "cpu"], id="auto"),
        pytest.param({"speech_model": "cpu", "language_model": "disk"}, ["disk", "disk"], id="parts"),
        pytest.param(PIECES, ["cpu", "disk"], id="pieces"),
    ],
)
def test_a_model_in_places_is_the_same(folders, features, tmp_path, device_map, fusion):
    places = {"device_map": copy.copy(device_map), "offload_folder": tmp_path / "offload"}
    model = VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole", **places)
    away = [layer.q_proj.weight.is_meta for layer in model.fusion]
    assert away == [place == "disk" for place in fusion]
    assert model.device == torch.device("cpu")
    full = VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole")
    for mode in ("full", "causal"):
        assert torch.equal(model.generate(features, fusion_mode=mode), full.generate(features, fusion_mode=mode))
    if any(away):
        with pytest.raises(ValueError, match="left to accelerate"):
            model.save_pretrained(tmp_path / "saved")


def test_parts_of_a_light_checkpoint_in_places(folders, features, tmp_path):
    full = VoxKrikriForConditionalGeneration.from_pretrained(folders / "light")
    places = {
        "speech_model.model.encoder": "disk",
        "speech_model.model.decoder": "cpu",
        "speech_model.proj_out": "cpu",
        "language_model": "cpu",
    }
    options = {"offload_folder": tmp_path / "offload"}
    model = VoxKrikriForConditionalGeneration.from_pretrained(folders / "light", device_map=places, **options)
    assert model.speech_model.model.encoder.conv1.weight.is_meta
    assert torch.equal(model.generate(features), full.generate(features))
    places |= {"language_model": "disk"}
    with pytest.raises(ValueError, match="keeps them off their device.*light=False"):
        VoxKrikriForConditionalGeneration.from_pretrained(folders / "light", device_map=places, **options)


@pytest.mark.parametrize("form", ["whole", "light"])
@pytest.mark.parametrize(
    ("named", "missing"), [("speech_model", "language_model"), ("language_model", "speech_model")]
)
def test_a_part_without_a_place_is_named(folders, form, named, missing):
    with pytest.raises(ValueError, match=missing):
        VoxKrikriForConditionalGeneration.from_pretrained(folders / form, device_map={named: "cpu"})


@pytest.fixture(scope="module")
def unloaded(folders):
    config = VoxKrikriConfig.from_pretrained(folders / "whole")
    with torch.device("meta"):
        return VoxKrikriForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"speech_model": 0, "language_model": 1}, {"fusion.0": 1, "fusion.1": 1, "speech_bytes": 0}),
        ({"speech_model": "cpu", "language_model": 1}, {"fusion.0": 1, "fusion.1": 1, "speech_bytes": 1}),
        ({"speech_model": "cpu", "language_model": "disk"}, {"fusion.0": "disk", "speech_bytes": "cpu"}),
        ({"": 0, f"{LAYERS}.2": 1, "fusion": 2}, {"fusion.0": 0, "fusion.1": 1, "text_bytes": 0}),
        ({"": 0}, {"fusion.0": 0, "fusion.1": 0, "text_bytes": 0}),
    ],
)
def test_the_fusion_lies_beside_its_layer(unloaded, given, expected):
    places = dict(given)
    unloaded.complete_device_map(places)
    assert {name: places[name] for name in expected} == expected
    assert {name: places[name] for name in given if name != "fusion"} | {"fusion": 2} == given | {"fusion": 2}
    assert "fusion" not in places


def test_the_fusion_lies_beside_its_layer_where_accelerate_decides(unloaded):
    sizes = {part: sum(p.nbytes for p in getattr(unloaded, part).parameters()) for part in ("speech_model", "fusion")}
    layer = sum(value.nbytes for value in unloaded.get_decoder().layers[0].parameters())
    room = sizes["speech_model"] + unloaded.get_input_embeddings().weight.nbytes + 3 * layer
    places = _get_device_map(unloaded, "sequential", {0: room, 1: 2 * layer, "cpu": 10**9}, None)
    seen = {places[f"{LAYERS}.{index}"] for index in range(3)}
    assert len(seen) > 1  # the layers really lie apart
    unloaded.complete_device_map(places)
    assert places["fusion.0"] == places[f"{LAYERS}.0"]
    assert places["fusion.1"] == places[f"{LAYERS}.2"]


# ---- Whisper, only while it listens


def test_offloaded_speech_is_a_copy_while_it_listens(folders, features):
    model = VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole")
    expected = model.generate(features)
    model.offload_speech()
    speech = model.speech_model
    home = {name: value.data_ptr() for name, value in speech.state_dict().items()}
    used = []
    for module in (speech.model.encoder.conv1, speech.model.decoder.layers[1].fc2, speech.proj_out):
        module.register_forward_hook(lambda module, *_: used.append(module.weight.data_ptr()))
    assert torch.equal(model.generate(features), expected)
    assert used
    assert not set(used) & set(home.values())
    assert {name: value.data_ptr() for name, value in speech.state_dict().items()} == home


def test_offloaded_speech_comes_home_after_an_error(folders, features):
    model = VoxKrikriForConditionalGeneration.from_pretrained(folders / "whole")
    model.offload_speech()
    home = [value.data_ptr() for value in model.speech_model.parameters()]
    with pytest.raises(ValueError, match="unknown to this Whisper"):
        model.listen(features, language="klingon")
    assert [value.data_ptr() for value in model.speech_model.parameters()] == home


def test_speech_that_accelerate_has_placed_is_not_offloaded(folders, tmp_path):
    places = {"speech_model": "cpu", "language_model": "disk"}
    model = VoxKrikriForConditionalGeneration.from_pretrained(
        folders / "whole", device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(ValueError, match="a device_map of one device"):
        model.offload_speech()


# ---- the table


def test_the_table_of_settings(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REPEATS", 1)
    memory.main(["--model", str(tiny.folder), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "memory.json").read_text())["settings"]
    sizes = {setting: row["LLM, GB"] + row["fusion, GB"] + row["Whisper, GB"] for setting, row in rows.items()}
    weights = sum(value.nbytes for value in tiny.model.parameters())
    assert sizes["float32"] * 1e9 == pytest.approx(weights, rel=0.1)
    assert sizes["bfloat16"] * 1e9 == pytest.approx(weights / 2, rel=0.2)
    assert all(row["peak, GB"] > sizes[setting] for setting, row in rows.items())
    assert len((tmp_path / "memory.md").read_text().splitlines()) == 2 + len(rows)
