"""How a VoxKrikri is written and read: safetensors in shards by part, or only what was trained; the code beside them.

A *self-contained* checkpoint holds all weights: one shard or more for the speech, the text and the fusion (with LoRA).
A *light* one holds what was trained alone; its configuration names the backbones by id and revision.

Either is loaded as transformers loads any model, part by part where that saves memory:

* `quantization_config`: the frozen linear layers of the LLM. Whisper, the fusion, LoRA and the head stay as they are.
* `device_map`: one of transformers' strategies, a device, or a dict such as {"speech_model": "cuda:0",
  "language_model": "cuda:1"}. Each fusion follows the layer that it adds to.
* `dtype` of all, but for `speech_dtype`, Whisper's.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, WhisperForConditionalGeneration
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_voxkrikri import VoxKrikriConfig


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, though accelerate may keep its weights elsewhere."""
    hook = next((part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")), None)
    return next(module.parameters()).device if hook is None else torch.device(hook.execution_device)


def _device_map_of(part: str, options: dict) -> dict:
    """The part's own device map, where the user's names parts."""
    whole = options.get("device_map")
    if not isinstance(whole, dict):
        return {}
    own = {key.removeprefix(part).removeprefix("."): device for key, device in whole.items() if key.startswith(part)}
    if "" in whole:
        own.setdefault("", whole[""])
    if not own:
        raise ValueError(f"device_map has no place for {part}, only for {', '.join(whole)}")
    return {"device_map": own}


def _for_frozen_linears(
    quantization_config: QuantizationConfigMixin | dict, config: VoxKrikriConfig, prefix: str
) -> QuantizationConfigMixin:
    """The user's quantisation, without the head and what is trained; with a `prefix`, of the LLM inside VoxKrikri.

    LoRA keeps its precision, as peft has it: its weights are few, and what training found is in their small differences.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    if not hasattr(quantization_config, "llm_int8_skip_modules"):
        raise ValueError(
            f"a {type(quantization_config).__name__} was given, and which layers to leave alone is known for "
            "BitsAndBytesConfig only: use that, or a light checkpoint beside an LLM that is quantised already"
        )
    theirs = quantization_config.llm_int8_skip_modules or []
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config.text_config)
    linears = {name: module for name, module in text.named_modules() if isinstance(module, nn.Linear)}
    head = next(name for name, module in linears.items() if module is text.get_output_embeddings())
    if all(name.startswith((head, *config.trained_text_modules)) for name in linears):
        raise ValueError(
            f"nothing of this LLM is left to quantise: all of it was trained ({', '.join(config.trained_text_modules)})"
        )
    kept = [f"{prefix}{name}" for name in (head, *theirs, *config.trained_text_modules)]
    if prefix:
        kept += [*(f"{name}.base_layer" for name in theirs), "speech_model", "fusion", r".*\.lora_[AB]"]
    quantization_config.llm_int8_skip_modules = list(dict.fromkeys([*theirs, *kept]))
    return quantization_config


class VoxKrikriCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of a model that says of a parameter's name whether `is_trained`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', but a missing, unexpected or misshapen tensor raises instead of being made up.

        A light checkpoint takes its backbones from the ids and revisions in its configuration.
        """
        config = kwargs.get("config")
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
        if config is None:
            config, _ = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        prefix = "" if config.light else "language_model."
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _for_frozen_linears(kwargs["quantization_config"], config, prefix)
        if config.light:
            return cls._from_light(pretrained_model_name_or_path, config, hub, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told here, and by name
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        problems = [
            f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(kind)
        ]
        if problems:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json ({'; '.join(problems)}): "
                "take both from the same checkpoint"
            )
        return (model, info) if wants_info else model

    @classmethod
    def _from_light(cls, source, config: VoxKrikriConfig, hub: dict, kwargs: dict):
        names = ("attn_implementation", "device_map", "max_memory", "offload_folder", "offload_buffers")
        options = {name: value for name, value in hub.items() if name != "revision"}
        options |= {name: kwargs[name] for name in names if name in kwargs}
        options["dtype"] = kwargs.get("dtype", kwargs.get("torch_dtype", config.dtype))
        text = AutoModelForCausalLM.from_pretrained(
            config.text_model_id,
            revision=config.text_model_revision,
            **options | _device_map_of("language_model", options),
            quantization_config=kwargs.get("quantization_config"),
        )
        options["dtype"] = config.speech_dtype or options["dtype"]
        speech = WhisperForConditionalGeneration.from_pretrained(
            config.speech_model_id,
            revision=config.speech_model_revision,
            **options | _device_map_of("speech_model", options),
        )
        if "device_map" not in options:
            speech.to(execution_device(text))  # a quantised LLM finds its device by itself
        model = cls(config, speech, text)
        model.put_beside_layers()
        state = load_file(cached_file(source, "model-fusion.safetensors", **hub))
        expected = {name: value for name, value in model.state_dict().items() if model._in_light(name)}
        wrong = sorted(
            name
            for name in state.keys() | expected.keys()
            if name not in state or name not in expected or state[name].shape != expected[name].shape
        )
        if wrong:
            raise ValueError(f"the light weights in {source} do not fit its config.json: {wrong[:5]}")
        away = [name for name in expected if expected[name].is_meta]
        if away:
            raise ValueError(
                f"the device_map leaves {away[:5]} to accelerate, which keeps them off their device: a light checkpoint "
                "brings weights for them. Give these layers a device, or load it once and save it with light=False"
            )
        model.load_state_dict(state, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
        return model.eval()

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, **kwargs):
        """transformers' own; between making the device map and using it."""
        if load_config.device_map is not None:
            model.complete_device_map(load_config.device_map)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)

    def complete_device_map(self, device_map: dict) -> None:
        """Puts each fusion where the layer is that it adds to, and the tables of spellings on a device that computes.

        Raises:
            ValueError: where the map has no place for Whisper or the LLM.
        """
        names = {module: name for name, module in self.named_modules()}
        for key in [key for key in device_map if key.split(".")[0] == "fusion"]:
            del device_map[key]

        def place_of(layer: nn.Module):
            parts = names[layer].split(".")
            above = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
            place = next((device_map[key] for key in above if key in device_map), None)
            if place is None:
                raise ValueError(
                    f"device_map has no place for {names[layer]}, only for {', '.join(device_map)}: "
                    "name speech_model and language_model, or parts of them"
                )
            return place

        place_of(self.speech_model.model.decoder.layers[-1])
        layers = self.get_decoder().layers
        places = {f"fusion.{i}": place_of(layers[layer - 1]) for i, layer in enumerate(self.config.injection_layers)}
        device_map |= places
        computing = (device for device in device_map.values() if device not in ("cpu", "disk"))
        device_map |= dict.fromkeys(("speech_bytes", "text_bytes"), next(computing, "cpu"))

    def put_beside_layers(self) -> None:
        """Moves the fusion, and the tables of spellings, to an LLM that was loaded by itself."""
        for fusion, layer in zip(self.fusion, self.config.injection_layers, strict=True):
            fusion.to(execution_device(self.get_decoder().layers[layer - 1]), self.language_model.dtype)
        for name in ("speech_bytes", "text_bytes"):
            self._buffers[name] = self._buffers[name].to(execution_device(self.language_model))

    def _in_light(self, name: str) -> bool:
        return self.is_trained(name) or name in ("speech_bytes", "text_bytes")

    def save_pretrained(
        self, save_directory, light: bool | None = None, max_shard_size: str = "5GB", **kwargs
    ) -> None:
        """Writes configuration, code and weights, in shards by part: speech, text, fusion (with LoRA).

        Args:
            light: write what was trained alone; the backbones are then loaded from their ids. None: as assembled.

        Raises:
            ValueError: for a light checkpoint of backbones without an id, or for this repository's own root.
        """
        folder = Path(save_directory)
        if (folder / "voxkrikri.py").exists():
            raise ValueError(f"{folder} is the project's own root: save into a folder of its own")
        light = self.config.light if light is None else light
        if light and not (self.config.speech_model_id and self.config.text_model_id):
            raise ValueError(
                "a light checkpoint needs the backbones' ids: assemble the model from ids, or save with light=False"
            )
        config = copy.deepcopy(self.config)
        config.light, config.architectures = light, [type(self).__name__]
        config.dtype = str(self.language_model.dtype).removeprefix("torch.")
        own = self.speech_model.dtype != self.language_model.dtype
        config.speech_dtype = str(self.speech_model.dtype).removeprefix("torch.") if own else None
        alone = getattr(self.language_model.config, "quantization_config", None)  # of an LLM that was loaded by itself
        config.text_config.__dict__.pop("quantization_config", None)
        if light:  # whoever loads it says how the LLM is quantised
            config.__dict__.pop("quantization_config", None)
        elif alone is not None:
            config.quantization_config = _for_frozen_linears(alone, config, "language_model.")
        state, seen = {}, set()
        for name, value in (kwargs.get("state_dict") or self.state_dict()).items():
            if light and not self._in_light(name):
                continue
            if value.is_meta:
                raise ValueError(f"{name} was left to accelerate, off its device: save a model loaded on one device")
            if value.data_ptr() not in seen or not value.numel():  # tied weights are written once
                seen.add(value.data_ptr())
                state[name] = value.contiguous()
        if light:
            parts = {"fusion": state}
        else:
            prefixes = {"speech": "speech_model.", "text": "language_model."}
            parts = {
                part: {n: value for n, value in state.items() if n.startswith(prefix) and ".lora_" not in n}
                for part, prefix in prefixes.items()
            }
            backbones = parts["speech"].keys() | parts["text"].keys()
            parts["fusion"] = {name: value for name, value in state.items() if name not in backbones}
        files, weight_map = {}, {}
        for part, tensors in parts.items():
            shards = split_torch_state_dict_into_shards(
                tensors, filename_pattern=f"model-{part}{{suffix}}.safetensors", max_shard_size=max_shard_size
            )
            for file, names in shards.filename_to_tensors.items():
                files[file] = {name: tensors[name] for name in names}
                weight_map |= dict.fromkeys(names, file)
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in files.items():
            save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
        for file in files:
            (folder / f"{file}.partial").replace(folder / file)
        for stale in folder.glob("model-*.safetensors"):
            if stale.name not in files:
                stale.unlink()
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if light:
            index.unlink(missing_ok=True)
        else:
            size = sum(value.numel() * value.element_size() for value in state.values())
            index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        self._save_code(folder)

    def _save_code(self, folder: Path) -> None:
        """Ships the Hub files: from beside this one or, where transformers copied this one alone, from the checkpoint."""
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
        ):
            name = f"{room}_voxkrikri.py"
            source = Path(__file__).parent / name
            if not source.exists():
                source = Path(cached_file(self.config._name_or_path, name))
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
