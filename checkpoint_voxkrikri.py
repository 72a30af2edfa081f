"""How a VoxKrikri is written and read: safetensors in shards by part, or only what was trained; the code beside them.

A *self-contained* checkpoint holds all weights: one shard or more for the speech, the text and the fusion (with LoRA).
A *light* one holds what was trained alone; its configuration names the backbones by id and revision.
"""

import copy
import json
import shutil
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, WhisperForConditionalGeneration
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .configuration_voxkrikri import VoxKrikriConfig


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
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
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
        options = {name: value for name, value in hub.items() if name != "revision"}
        options["dtype"] = kwargs.get("dtype", kwargs.get("torch_dtype", config.dtype))
        if "attn_implementation" in kwargs:
            options["attn_implementation"] = kwargs["attn_implementation"]
        speech, text = config.speech_model_id, config.text_model_id
        model = cls(
            config,
            WhisperForConditionalGeneration.from_pretrained(speech, revision=config.speech_model_revision, **options),
            AutoModelForCausalLM.from_pretrained(text, revision=config.text_model_revision, **options),
        )
        model.fusion.to(model.language_model.dtype)
        state = load_file(cached_file(source, "model-fusion.safetensors", **hub))
        expected = {name: value for name, value in model.state_dict().items() if model._in_light(name)}
        wrong = sorted(
            name
            for name in state.keys() | expected.keys()
            if name not in state or name not in expected or state[name].shape != expected[name].shape
        )
        if wrong:
            raise ValueError(f"the light weights in {source} do not fit its config.json: {wrong[:5]}")
        model.load_state_dict(state, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
        return model.eval()

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
        folder.mkdir(parents=True, exist_ok=True)
        state, seen = {}, set()
        for name, value in (kwargs.get("state_dict") or self.state_dict()).items():
            if value.data_ptr() not in seen or not value.numel():  # tied weights are written once
                seen.add(value.data_ptr())
                state[name] = value.contiguous()
        if light:
            parts = {"fusion": {name: value for name, value in state.items() if self._in_light(name)}}
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
        config = copy.deepcopy(self.config)
        config.light, config.architectures = light, [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
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
