"""Configuration of VoxKrikri: a Whisper, a decoder-only LLM, and how the one is fused into the other."""

from transformers import AutoConfig, PretrainedConfig, WhisperConfig


FUSION_MODES = ("full", "causal")
ALIGNMENTS = ("ratio", "text")


class VoxKrikriConfig(PretrainedConfig):
    """Holds both backbones' configurations and everything that fusion, alignment and LoRA need to be rebuilt.

    Args:
        speech_config: a WhisperConfig or its dict.
        text_config: the configuration, or its dict, of a decoder-only LLM with a plain stack of layers.
        speech_generation_config: Whisper's generation config as a dict (language ids, suppressed tokens, alignment
            heads).
        injection_layers: LLM layers, counted from 1, after which the audio is added. None: one, two thirds up.
        fusion_heads: heads of the cross-attention. None: as many as the LLM's attention has.
        fusion_norm: RMSNorm on the text states before Q; without it the fusion is Eq. 5 to the letter.
        fusion_mode: "full" (offline) or "causal" (Eqs. 3-4), the default of forward and generate.
        alignment: "ratio" (s_t = floor(S/T t), Eq. 3) or "text" (the state of the hypothesis token at which
            the text so far stands, by edit distance).
        alignment_lookahead: k, in Whisper tokens, added to s_t in causal fusion.
        alignment_prior: adds -(s - c_t - m)^2 / (2 sigma^2) to M: c_t is the aligned position, shift m and width sigma
                are learned per head.
        copy_hypothesis: a row of the text is also shown the token that the hypothesis goes on with where the text
            stands (text alignment alone), as pointer networks do: copying need not be learnt letter by letter.
        copy_bias: where text is written, added to the logit of the token that copy_hypothesis shows, in nats. Training
            reads the reference; writing reads what it wrote itself, where one change leads to the next. `tools/tune.py`
            finds it on validation clips.
        states_per_token: the constant S/T used where the hypothesis's LLM tokens are not counted, as in a stream.
        lora: keyword arguments of peft.LoraConfig for the LLM, or None for no adapter.
        trained_text_modules: name prefixes inside the LLM, such as "lm_head", that training changes beside LoRA.
        speech_dtype: Whisper's, such as "float16"; None: as the LLM's. (A dict of dtypes is no longer heeded by
            transformers.)
        light: whether checkpoints hold only what was trained and take the backbones from their ids.
        speech_model_id, speech_model_revision, text_model_id, text_model_revision: where the backbones came from.

    Raises:
        ValueError: for a speech_config that is not Whisper's, an injection layer outside the LLM's stack, or an
            unknown mode.
    """

    model_type = "voxkrikri"
    sub_configs = {"speech_config": WhisperConfig, "text_config": AutoConfig}

    def __init__(
        self,
        speech_config: WhisperConfig | dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        speech_generation_config: dict | None = None,
        injection_layers: list[int] | None = None,
        fusion_heads: int | None = None,
        fusion_norm: bool = True,
        fusion_mode: str = "full",
        alignment: str = "ratio",
        alignment_lookahead: int = 0,
        alignment_prior: bool = False,
        copy_hypothesis: bool = False,
        copy_bias: float = 0.0,
        states_per_token: float = 1.0,
        lora: dict | None = None,
        trained_text_modules: list[str] | None = None,
        speech_dtype: str | None = None,
        light: bool = False,
        speech_model_id: str | None = None,
        speech_model_revision: str | None = None,
        text_model_id: str | None = None,
        text_model_revision: str | None = None,
        **kwargs,
    ):
        text_config = self._build("text_config", text_config, "llama")
        # Written out, since register_for_auto_class keeps a single auto class for each of ours.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_voxkrikri.VoxKrikriConfig",
            "AutoModel": "modeling_voxkrikri.VoxKrikriForConditionalGeneration",
            "AutoModelForSpeechSeq2Seq": "modeling_voxkrikri.VoxKrikriForConditionalGeneration",
            "AutoProcessor": "processing_voxkrikri.VoxKrikriProcessor",
        }
        kwargs["custom_pipelines"] = {
            "automatic-speech-recognition": {
                "impl": "pipeline_voxkrikri.VoxKrikriPipeline",
                "pt": ["AutoModelForSpeechSeq2Seq"],
                "type": "multimodal",
            }
        }
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        kwargs["tie_word_embeddings"] = False  # each backbone ties its own
        super().__init__(**kwargs)  # first: it resets the attention implementation of sub-configurations it finds
        self.speech_config = self._build("speech_config", speech_config, "whisper")
        self.text_config = text_config
        if self.speech_config.model_type != "whisper":
            raise ValueError(f"speech_config must be a Whisper configuration, got {self.speech_config.model_type!r}")
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            if getattr(text_config, name, None) is None:
                raise ValueError(
                    f"text_config must be of a decoder-only LLM with attention layers; {text_config.model_type!r} "
                    f"has no {name}"
                )
        layers = self.text_config.num_hidden_layers
        self.injection_layers = [round(2 * layers / 3)] if injection_layers is None else list(injection_layers)
        if not self.injection_layers or not all(1 <= layer <= layers for layer in self.injection_layers):
            raise ValueError(
                f"injection_layers must name layers 1 to {layers} of the {self.text_config.model_type} stack, "
                f"got {self.injection_layers}"
            )
        if len(set(self.injection_layers)) < len(self.injection_layers):
            raise ValueError(f"injection_layers must differ from each other, got {self.injection_layers}")
        self.fusion_heads = self.text_config.num_attention_heads if fusion_heads is None else fusion_heads
        if self.fusion_heads < 1 or self.text_config.hidden_size % self.fusion_heads:
            raise ValueError(
                f"fusion_heads must divide the LLM's hidden size {self.text_config.hidden_size}, "
                f"got {self.fusion_heads}"
            )
        if fusion_mode not in FUSION_MODES:
            raise ValueError(f"fusion_mode must be one of {FUSION_MODES}, got {fusion_mode!r}")
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
        if copy_hypothesis and alignment != "text":
            raise ValueError(f'copy_hypothesis needs alignment="text", which knows the place, got {alignment!r}')
        if copy_bias and not copy_hypothesis:
            raise ValueError(f"copy_bias ({copy_bias}) needs copy_hypothesis, which knows the token")
        if alignment_lookahead < 0:
            raise ValueError(f"alignment_lookahead counts Whisper tokens from 0, got {alignment_lookahead}")
        if states_per_token <= 0:
            raise ValueError(f"states_per_token must be positive, got {states_per_token}")
        self.speech_generation_config = speech_generation_config
        self.fusion_norm = fusion_norm
        self.fusion_mode = fusion_mode
        self.alignment = alignment
        self.alignment_lookahead = alignment_lookahead
        self.alignment_prior = alignment_prior
        self.copy_hypothesis = copy_hypothesis
        self.copy_bias = copy_bias
        self.states_per_token = states_per_token
        self.lora = lora
        self.trained_text_modules = trained_text_modules or []
        self.speech_dtype = speech_dtype
        self.light = light
        self.speech_model_id = speech_model_id
        self.speech_model_revision = speech_model_revision
        self.text_model_id = text_model_id
        self.text_model_revision = text_model_revision

    @staticmethod
    def _build(name: str, config: PretrainedConfig | dict | None, default_type: str) -> PretrainedConfig:
        if config is None:
            return AutoConfig.for_model(default_type)
        if isinstance(config, dict):
            return AutoConfig.for_model(**{"model_type": default_type} | config)
        if isinstance(config, PretrainedConfig):
            return config
        raise TypeError(f"{name} must be a configuration or a dict, got {type(config).__name__}")
