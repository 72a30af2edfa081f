"""VoxKrikri: a frozen Whisper's decoder states, fused by cross-attention into inner layers of a decoder-only LLM.

After "VOX-KRIKRI: Unifying Speech and Language through Continuous Fusion" (arXiv 2509.15667). What is unusual here:

* The audio the LLM sees is A, the last hidden states of Whisper's *decoder* over its own hypothesis: one vector a token.
* Eq. 5 is `CrossModalFusion`; Eqs. 3-4 are in `alignment_voxkrikri.py`.
* The LLM is not subclassed. A forward hook on its layer I adds the audio; the decoder hands our `audio_*` keyword
  arguments down to it. V starts at zero, so that an untrained fusion leaves the LLM's logits as they are, to the bit.
* Every row of text carries t, its place in the transcript. Training, left padding, decoding one row or many: one code.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperForConditionalGeneration,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .alignment_voxkrikri import LONGEST_PIECE, VoxKrikriAlignmentMixin, alignment_mask, token_bytes
from .checkpoint_voxkrikri import VoxKrikriCheckpointMixin, execution_device
from .configuration_voxkrikri import FUSION_MODES, VoxKrikriConfig
from .generation_voxkrikri import VoxKrikriGenerationMixin


try:
    from peft import LoraConfig, inject_adapter_in_model
except ImportError:
    LoraConfig = None


SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # gemma2, granite, cohere


class CrossModalFusion(nn.Module):
    """Eq. 5: h_t <- h_t + softmax((Y_t Q)(A_s K)^T / sqrt(d) + M_{t,s}) (A_s V), in heads.

    Y is h itself, normalised unless `fusion_norm` is off. With one head and no norm this is the equation to the letter.
    `copy_hypothesis` adds E_t C, where E_t is the LLM's embedding of the token that the hypothesis goes on with.
    """

    def __init__(self, config: VoxKrikriConfig):
        super().__init__()
        hidden, speech_hidden = config.text_config.hidden_size, config.speech_config.d_model
        self.heads, self.head_size = config.fusion_heads, hidden // config.fusion_heads
        self.norm = nn.RMSNorm(hidden, eps=1e-6) if config.fusion_norm else nn.Identity()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(speech_hidden, hidden, bias=False)
        self.v_proj = nn.Linear(speech_hidden, hidden, bias=False)
        self.copy_proj = nn.Linear(hidden, hidden, bias=False) if config.copy_hypothesis else None
        self.prior_shift = nn.Parameter(torch.empty(self.heads)) if config.alignment_prior else None
        self.log_sigma = nn.Parameter(torch.empty(self.heads)) if config.alignment_prior else None

    def project_audio(self, audio_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A K and A V, each `(batch, heads, states, head size)`, from `(batch, states, d_speech)`."""
        keys = self.k_proj(audio_states).unflatten(-1, (self.heads, self.head_size))
        values = self.v_proj(audio_states).unflatten(-1, (self.heads, self.head_size))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.BoolTensor,
        offsets: torch.Tensor,
        is_text: torch.BoolTensor,
        copies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what is added to h, `(batch, rows, hidden)`.

        Args:
            hidden_states: h, `(batch, rows, hidden)`.
            keys, values: from `project_audio`.
            mask, offsets: `(batch, rows, states)`, the states seen and s - c_t.
            is_text: `(batch, rows)`, False where no audio may enter.
            copies: E, `(batch, rows, hidden)`.
        """
        queries = self.q_proj(self.norm(hidden_states)).unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)
        scores = (queries @ keys.transpose(-1, -2)).float() / self.head_size**0.5
        if self.log_sigma is not None:
            distance = offsets[:, None] - self.prior_shift.float()[:, None, None]
            scores = scores - distance**2 / (2 * self.log_sigma.float().exp()[:, None, None] ** 2)
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
        mixed = (scores.softmax(-1).to(values.dtype) @ values).transpose(1, 2).flatten(-2)
        if self.copy_proj is not None:
            mixed = mixed + self.copy_proj(nn.functional.rms_norm(copies, copies.shape[-1:]))
        return mixed * is_text[..., None]


class LoraLinear(nn.Module):
    """A linear layer with its adapter under peft's parameter names, for inference where peft is not installed."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base_layer, self.scaling = base_layer, alpha / rank
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self._disable_adapters = False

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return self.scaling * self.lora_B[adapter].weight @ self.lora_A[adapter].weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._disable_adapters:
            return self.base_layer(hidden_states)
        update = self.lora_B["default"](self.lora_A["default"](hidden_states))
        return self.base_layer(hidden_states) + self.scaling * update


class VoxKrikriForConditionalGeneration(
    VoxKrikriAlignmentMixin, VoxKrikriCheckpointMixin, VoxKrikriGenerationMixin, PreTrainedModel
):
    """Whisper, a decoder-only LLM, and the fusion between them.

    Assemble one with `from_pretrained_backbones`, reload it with `from_pretrained`.
    """

    config_class = VoxKrikriConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: VoxKrikriConfig,
        speech_model: WhisperForConditionalGeneration | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        """Builds from the configuration alone; `speech_model` and `language_model` are taken over where given."""
        super().__init__(config)
        self.speech_model = speech_model or WhisperForConditionalGeneration._from_config(
            config.speech_config, dtype=config.speech_dtype or config.speech_config.dtype
        )
        if config.speech_generation_config is not None:
            self.speech_model.generation_config = GenerationConfig(**config.speech_generation_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        layers = self._decoder_layers()
        self.fusion = nn.ModuleList(CrossModalFusion(config) for _ in config.injection_layers)
        for index, layer in enumerate(config.injection_layers):
            layers[layer - 1].register_forward_hook(partial(self._fuse, index), with_kwargs=True)
        # What each token writes, for the text alignment.
        for name, part in (("speech_bytes", config.speech_config), ("text_bytes", config.text_config)):
            self.register_buffer(name, torch.zeros(part.vocab_size, LONGEST_PIECE, dtype=torch.uint8))
        if config.lora is not None:
            self.add_lora(config.lora)
        self.post_init()

    def _decoder_layers(self) -> nn.ModuleList:
        decoder = self.language_model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) != self.config.text_config.num_hidden_layers:
            raise ValueError(
                f"{type(self.language_model).__name__} has no plain stack of decoder layers (get_decoder().layers), "
                "after one of which the audio could be added: choose a decoder-only LLM such as Llama, Mistral or Qwen"
            )
        parameters = inspect.signature(layers[0].forward).parameters.values()
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            raise ValueError(
                f"{type(layers[0]).__name__} takes no further keyword arguments, by which the audio would reach it: "
                "choose a decoder-only LLM such as Llama, Mistral or Qwen"
            )
        return layers

    def add_lora(self, lora: dict) -> None:
        """Puts an adapter beside linear layers of the LLM, which at first changes nothing. `lora`: LoraConfig's settings."""
        self.config.lora = lora
        if LoraConfig is not None:
            inject_adapter_in_model(LoraConfig(**lora), self.language_model)
        else:
            unknown = lora.keys() - {"r", "lora_alpha", "lora_dropout", "target_modules"}
            if unknown:
                raise ValueError(f"the LoRA options {sorted(unknown)} need the peft package: pip install peft")
            targets = lora["target_modules"]
            linears = [(name, m) for name, m in self.language_model.named_modules() if isinstance(m, nn.Linear)]
            for name, linear in linears:
                head = linear is self.language_model.get_output_embeddings()
                if not head if targets == "all-linear" else name.split(".")[-1] in targets:
                    self.language_model.set_submodule(name, LoraLinear(linear, lora["r"], lora["lora_alpha"]))
        for name, module in self.language_model.named_modules():
            if ".lora_" in name:
                module._is_hf_initialized = True  # peft has done it: B starts at zero

    def _init_weights(self, module: nn.Module) -> None:
        """Q and K as the LLM's own linears, V and C zero; the prior's heads look 0, 1, 2, 3 states ahead, ever less sharply.

        A token is spelt by a few states in a row, and nothing else in Eq. 5 tells the first of them from the next.
        """
        for fusion in self.fusion:  # leaf by leaf: transformers skips a module that has no parameter of its own
            if module in (fusion.q_proj, fusion.k_proj):
                init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            elif module in (fusion.v_proj, fusion.copy_proj):
                init.zeros_(module.weight)
            elif module is fusion and fusion.log_sigma is not None:
                init.copy_(fusion.prior_shift, torch.arange(fusion.heads) % 4.0)
                init.copy_(fusion.log_sigma, torch.linspace(-1, 1, fusion.heads) * torch.log(torch.tensor(2.0)))

    # ---- the parts

    @classmethod
    def from_pretrained_backbones(
        cls,
        speech: str | WhisperForConditionalGeneration,
        text: str | PreTrainedModel,
        *,
        speech_tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        text_kwargs: dict | None = None,
        **fusion,
    ) -> "VoxKrikriForConditionalGeneration":
        """A new model from a pretrained Whisper and a pretrained LLM: ids, folders or loaded models.

        Args:
            speech_tokenizer, tokenizer: the two vocabularies; needed for `alignment="text"` alone.
            text_kwargs: further arguments of the LLM's from_pretrained, such as quantization_config.
            fusion: VoxKrikriConfig's arguments, the revisions of the backbones among them.
        """
        for part, source in (("speech", speech), ("text", text)):
            if isinstance(source, str):  # an id is pinned to the commit that its name and revision mean today
                revision = fusion.get(f"{part}_model_revision")
                commit = extract_commit_hash(cached_file(source, CONFIG_NAME, revision=revision), None)
                fusion |= {f"{part}_model_id": source, f"{part}_model_revision": commit or revision}
        if isinstance(speech, str):
            revision = fusion["speech_model_revision"]
            speech = WhisperForConditionalGeneration.from_pretrained(speech, revision=revision, dtype=dtype)
        if isinstance(text, str):
            revision = fusion["text_model_revision"]
            text = AutoModelForCausalLM.from_pretrained(text, revision=revision, dtype=dtype, **(text_kwargs or {}))
        config = VoxKrikriConfig(
            speech_config=speech.config,
            text_config=text.config,
            speech_generation_config=speech.generation_config.to_dict(),
            **fusion,
        )
        if config.alignment == "text" and (tokenizer is None or speech_tokenizer is None):
            raise ValueError('alignment="text" compares texts: give both tokenizer and speech_tokenizer')
        model = cls(config, speech, text)
        model.put_beside_layers()
        if tokenizer is not None and speech_tokenizer is not None:
            model.speech_bytes.copy_(token_bytes(speech_tokenizer, config.speech_config.vocab_size))
            model.text_bytes.copy_(token_bytes(tokenizer, config.text_config.vocab_size))
        source = text.generation_config
        if source.eos_token_id is None and text.config.eos_token_id is None:
            raise ValueError(
                f"{type(text).__name__} has no eos_token_id, with which a text ends: set it in its config"
            )
        model.generation_config = GenerationConfig(
            bos_token_id=source.bos_token_id,
            eos_token_id=source.eos_token_id if source.eos_token_id is not None else text.config.eos_token_id,
            pad_token_id=source.pad_token_id,
            max_new_tokens=speech.config.max_target_positions,
        )
        model.freeze_backbones()
        return model

    def is_trained(self, name: str) -> bool:
        """Whether the parameter `name` is among what VoxKrikri trains: the fusion, LoRA, `trained_text_modules`."""
        modules = tuple(f"language_model.{module}" for module in self.config.trained_text_modules)
        return name.startswith("fusion.") or ".lora_" in name or (bool(modules) and name.startswith(modules))

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """What training changes, and nothing else: enough to go on from, beside the same backbones."""
        return {name: value.contiguous() for name, value in self.state_dict().items() if self.is_trained(name)}

    def freeze_backbones(self) -> None:
        """Leaves a gradient to what is trained alone. Loading makes everything trainable: call it before training.

        Raises:
            ValueError: where `trained_text_modules` names nothing of the LLM's.
        """
        names = [name for name, _ in self.language_model.named_parameters()]
        for module in self.config.trained_text_modules:
            if not any(name.startswith(module) for name in names):
                raise ValueError(
                    f"trained_text_modules names {module!r}, and {type(self.language_model).__name__} has no parameters "
                    f"of its own there (a tied head is trained as its embeddings); it has {', '.join(names[:3])} ..."
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_trained(name))

    def train(self, mode: bool = True) -> "VoxKrikriForConditionalGeneration":
        super().train(mode)
        self.speech_model.eval()  # frozen, always
        return self

    def _adapted_modules(self) -> dict[str, nn.Module]:
        return {name: m for name, m in self.language_model.named_modules() if hasattr(m, "get_delta_weight")}

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """The LLM as it was before training, for text alone: no adapter and, where no audio is given, no fusion."""
        modules = self._adapted_modules().values()
        for module in modules:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module in modules:
                module._disable_adapters = False

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Adds the adapter to the LLM's weights and forgets it: the same model, as fast as one without.

        Raises:
            ValueError: for quantised weights, which cannot take it up.
        """
        for name, module in self._adapted_modules().items():
            base = module.base_layer
            if not base.weight.is_floating_point():
                raise ValueError(f"{name} has quantised weights: load the LLM in bfloat16 to merge the adapter")
            base.weight += module.get_delta_weight("default").to(base.weight.dtype)
            self.language_model.set_submodule(name, base)
        self.config.lora = None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # ---- fusion

    def project_audio(self, audio_states: torch.FloatTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every fusion, `(batch, fusions, heads, states, head size)`: once for an utterance."""
        pairs = (
            fusion.project_audio(audio_states.to(execution_device(fusion), fusion.k_proj.weight.dtype))
            for fusion in self.fusion
        )
        keys, values = zip(*pairs, strict=True)
        return tuple(torch.stack([part.to(self.device) for part in parts], dim=1) for parts in (keys, values))

    def _fuse(self, index: int, layer: nn.Module, args: tuple, kwargs: dict, output):
        """The hook on layer I: h <- h + fusion(h, audio). Without audio the LLM stays as it is."""
        keys = kwargs.get("audio_keys")
        if keys is None:
            return output
        hidden_states = output[0] if isinstance(output, tuple) else output
        hidden_states = hidden_states + self.fusion[index](
            hidden_states,
            keys[:, index],
            kwargs["audio_values"][:, index],
            kwargs["audio_mask"],
            kwargs["audio_offsets"],
            kwargs["audio_is_text"],
            kwargs.get("audio_copies"),
        )
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        input_features: torch.FloatTensor | None = None,
        language: str | None = None,
        hypothesis_ids: torch.LongTensor | None = None,
        audio_states: torch.FloatTensor | None = None,
        state_lengths: torch.LongTensor | None = None,
        audio_keys: torch.Tensor | None = None,
        audio_values: torch.Tensor | None = None,
        text_positions: torch.LongTensor | None = None,
        text_reached: torch.LongTensor | None = None,
        state_waits: torch.LongTensor | None = None,
        hypothesis_token_counts: torch.LongTensor | None = None,
        fusion_mode: str | None = None,
        alignment_lookahead: int | None = None,
        copy_bias: float = 0.0,
        loss_chunk_size: int | None = None,
        language_model: Callable | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """The LLM's logits and loss with the audio fused in; without any audio, the plain LLM's.

        Args:
            input_ids: `(batch, rows)`, prompt and text.
            labels: `(batch, rows)`, unshifted: -100 on prompt and padding.
            input_features: `(batch, mel bins, frames)`: Whisper listens first; or, made earlier,
            hypothesis_ids: `(batch, n)`, right-padded with Whisper's end of text, and
            audio_states: `(batch, n + 1, d_speech)` with state_lengths `(batch,)`; or
            audio_keys, audio_values: what `project_audio` makes of them.
            text_positions: `(batch, rows)`: t, the transcript token each row predicts, -1 outside; from the labels
                if left out.
            text_reached: `(batch, rows)`, for the text alignment: see `follow_hypothesis`, which makes it if left out.
            state_waits: `(batch, rows)`, states that each row sees beyond its alignment (`greedy_search`).
            hypothesis_token_counts: `(batch,)`, T; `states_per_token` stands in for S/T if left out.
            fusion_mode, alignment_lookahead: instead of the configuration's.
            copy_bias: added to the logits of the tokens that copy_hypothesis shows; `generate` gives the configuration's.
            loss_chunk_size: with labels, the loss alone: logits are made for so many labelled rows at a time, and made
                again for the gradient. With a large vocabulary they would fill the memory.
            language_model: the LLM's forward, compiled, to be called instead.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "forward needs input_ids, the text beside the audio. To transcribe, call model.generate(input_features=...)"
                ' or pipeline("automatic-speech-recognition", model=<folder or Hub id>, trust_remote_code=True):'
                " given a loaded model, pipeline() builds the stock class, which cannot run this one"
            )
        mode = self.config.fusion_mode if fusion_mode is None else fusion_mode
        if mode not in FUSION_MODES:
            raise ValueError(f"fusion_mode must be one of {FUSION_MODES}, got {mode!r}")
        if copy_bias and not self.config.copy_hypothesis:
            raise ValueError(f"copy_bias ({copy_bias}) needs a model with copy_hypothesis, which knows the token")
        if audio_keys is None and (audio_states is not None or input_features is not None):
            if audio_states is None:
                audio = self.listen(input_features, language, hypothesis_ids)
                hypothesis_ids, audio_states, state_lengths = audio.to_tuple()
            elif state_lengths is None:
                raise ValueError("audio_states need state_lengths, how many of each clip's states are real")
            audio_keys, audio_values = self.project_audio(audio_states)
        if audio_keys is not None:
            if text_positions is None:
                if labels is None:
                    raise ValueError("beside audio, forward needs text_positions or labels to place the text")
                text_positions = positions_from_labels(labels)
            if text_reached is None and input_ids is not None:
                text = input_ids if labels is None else torch.where(labels < 0, input_ids, labels)  # noise is no text
                text_reached = self.follow_hypothesis(text, text_positions, hypothesis_ids)
            if state_waits is None:
                state_waits = self._waits_for_end(labels, state_lengths) if labels is not None else 0
            aligned, centres = self.align(
                text_positions, state_lengths, text_reached, hypothesis_ids, hypothesis_token_counts
            )
            visible = self.last_visible_state(aligned, state_lengths, mode, alignment_lookahead, state_waits)
            num_states = audio_keys.shape[-2]
            kwargs |= {
                "audio_keys": audio_keys,
                "audio_values": audio_values,
                "audio_mask": alignment_mask(text_positions, visible, num_states),
                "audio_offsets": torch.arange(num_states, device=centres.device) - centres[..., None],
                "audio_is_text": text_positions >= 0,
            }
            if self.config.copy_hypothesis:
                copied = self.copied_tokens(text_reached, visible, hypothesis_ids, state_lengths)
                embeddings = self.get_input_embeddings()(copied.clamp(min=0))
                kwargs["audio_copies"] = embeddings * (copied >= 0)[..., None].to(embeddings.device)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        } | kwargs
        if labels is not None and loss_chunk_size is not None:
            hidden_states = self.get_decoder()(**inputs).last_hidden_state
            return CausalLMOutputWithPast(
                loss=self._chunked_loss(hidden_states, labels, loss_chunk_size, num_items_in_batch)
            )
        output = (language_model or self.language_model)(logits_to_keep=logits_to_keep, **inputs)
        if copy_bias and audio_keys is not None:
            kept = copied[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            kept = kept.to(output.logits.device)
            bias = (copy_bias * (kept >= 0)).to(output.logits.dtype)
            output.logits.scatter_add_(2, kept.clamp(min=0)[..., None], bias[..., None])
        if labels is not None:
            output.loss = self.loss_function(
                output.logits,
                labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return output

    def _chunked_loss(
        self, hidden_states: torch.Tensor, labels: torch.LongTensor, chunk_size: int, num_items_in_batch
    ) -> torch.Tensor:
        """The mean cross-entropy of the rows that predict a label, as the loss function gives it from all logits."""
        scaled = [name for name in SCALED_LOGITS if getattr(self.config.text_config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise ValueError(
                f"this LLM changes its logits ({scaled[0]}), which loss_chunk_size does not: leave it out"
            )
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        predicts = targets != -100
        head = self.get_output_embeddings()

        def loss_of(hidden: torch.Tensor, target: torch.LongTensor) -> torch.Tensor:
            return nn.functional.cross_entropy(head(hidden).float(), target, reduction="sum")

        chunks = zip(hidden_states[predicts].split(chunk_size), targets[predicts].split(chunk_size), strict=True)
        total = sum(checkpoint(loss_of, hidden, target, use_reentrant=False) for hidden, target in chunks)
        return total / (predicts.sum() if num_items_in_batch is None else num_items_in_batch)

    def _waits_for_end(self, labels: torch.LongTensor, state_lengths: torch.LongTensor) -> torch.LongTensor:
        """In training the row that predicts the end sees every state, `(batch, rows)`."""
        ends = torch.isin(labels, torch.tensor(self.end_token_ids, device=labels.device))
        return nn.functional.pad(ends[:, 1:], (0, 1)) * state_lengths[:, None]


def positions_from_labels(labels: torch.LongTensor) -> torch.LongTensor:
    """t of every row, `(batch, rows)`: the row before the first label predicts token 0; -1 outside the text."""
    predicts = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    return torch.where(predicts, predicts.cumsum(-1) - 1, -1)
