"""From speech to token ids: Whisper's hypothesis and states, then the fused LLM's text.

* `listen` runs Whisper: hypothesis ids, and the decoder states A that every fused row attends to.
* `generate` runs the LLM over them. Greedy decoding is `greedy_search`, handed to transformers' own `generate`; beams
  and sampling are transformers'.
* In causal mode the end may be written only by a row that sees the last state. Greedy decoding waits there for one state
  more; beams and sampling just may not take the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import ModelOutput

from .cache_voxkrikri import room_for_graphs
from .checkpoint_voxkrikri import execution_device
from .greedy_voxkrikri import greedy_search


CACHING_OPTIONS = ("cache_implementation", "compile_config", "disable_compile")  # transformers' names


@dataclass
class VoxKrikriAudio(ModelOutput):
    """What Whisper makes of a batch of clips.

    Args:
        hypothesis_ids: `(batch, n)` text tokens, right-padded with Whisper's end of text.
        audio_states: `(batch, n + 1, d_speech)`, the decoder states A_0 .. A_n.
        state_lengths: `(batch,)`, S of every clip: its hypothesis tokens and one.
    """

    hypothesis_ids: torch.LongTensor | None = None
    audio_states: torch.FloatTensor | None = None
    state_lengths: torch.LongTensor | None = None


@dataclass
class VoxKrikriGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: `(batch, tokens)` new text tokens, the prompt left out, padded after the end.
        token_logprobs: `(batch, tokens)` log-probability of every token, 0 on padding.
        hypothesis_ids, audio_states, state_lengths: as in VoxKrikriAudio.
        passes: how often the LLM ran (greedy decoding alone, as what follows).
        drafted, accepted: `(batch,)`, draft tokens that were verified, and those that were right.
    """

    sequences: torch.LongTensor | None = None
    token_logprobs: torch.FloatTensor | None = None
    hypothesis_ids: torch.LongTensor | None = None
    audio_states: torch.FloatTensor | None = None
    state_lengths: torch.LongTensor | None = None
    passes: int | None = None
    drafted: torch.LongTensor | None = None
    accepted: torch.LongTensor | None = None


class NoEndBeforeLastState(LogitsProcessor):
    """Forbids the end of text in causal rows that do not see the last state yet."""

    def __init__(self, model, prompt_length: int, lookahead: int | None, audio: dict[str, torch.Tensor | None]):
        self.model, self.prompt_length, self.lookahead, self.audio = model, prompt_length, lookahead, audio

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        audio = {
            name: None if value is None else value.repeat_interleave(len(input_ids) // len(value), dim=0)
            for name, value in self.audio.items()
        }
        rows = self.model.text_rows(input_ids, self.prompt_length, audio["hypothesis_ids"])
        rows = {name: value[:, -1:] for name, value in rows.items()}
        early = ~self.model.sees_last_state(alignment_lookahead=self.lookahead, **rows, **audio)
        scores = scores.clone()
        scores[:, self.model.end_token_ids] = scores[:, self.model.end_token_ids].masked_fill(early, -torch.inf)
        return scores


class VoxKrikriGenerationMixin(GenerationMixin):
    """Decoding of VoxKrikriForConditionalGeneration, which owns `speech_model` and `language_model`."""

    speech_is_offloaded = False  # by offload_speech
    # Tensors of one row per clip that place the states beside the text, whatever is being decoded.
    ALIGNMENT_INPUTS = ("state_lengths", "hypothesis_ids", "hypothesis_token_counts")

    @property
    def device(self) -> torch.device:
        """Where texts and states come in: the LLM's, or its first, wherever Whisper lies."""
        return self.text_bytes.device

    @property
    def end_token_ids(self) -> list[int]:
        """The LLM's end-of-text tokens (some have several)."""
        end = self.generation_config.eos_token_id
        return list(end) if isinstance(end, list | tuple) else [end]

    @property
    def start_token_id(self) -> int:
        """What a text without a prompt starts from: the LLM's BOS or, where it has none, its padding or end token."""
        config = self.generation_config
        candidates = (config.bos_token_id, config.pad_token_id, self.end_token_ids[0])
        return next(token for token in candidates if token is not None)

    def speech_prefix(self, encoder_outputs: BaseModelOutput, language: str | None = None) -> torch.LongTensor:
        """Whisper's decoder prefix `(batch, p)`: start of transcript, language and task if multilingual, no timestamps.

        Args:
            language: a code ("el"), an English name ("greek") or None: the checkpoint's default, else detected.
        """
        config = self.speech_model.generation_config
        batch, device = len(encoder_outputs.last_hidden_state), encoder_outputs.last_hidden_state.device
        prefix = [torch.full((batch,), config.decoder_start_token_id, device=device)]
        if getattr(config, "is_multilingual", False):
            language = language or getattr(config, "language", None)
            if language is None:
                prefix.append(self.speech_model.detect_language(encoder_outputs=encoder_outputs))
            else:
                token = f"<|{TO_LANGUAGE_CODE.get(language.lower(), language.lower())}|>"
                if token not in config.lang_to_id:
                    known = ", ".join(sorted(name.strip("<|>") for name in config.lang_to_id))
                    raise ValueError(f"language {language!r} is unknown to this Whisper; it knows {known}")
                prefix.append(torch.full((batch,), config.lang_to_id[token], device=device))
            prefix.append(torch.full((batch,), config.task_to_id["transcribe"], device=device))
        elif language is not None:
            raise ValueError(f"language {language!r} was given, but this Whisper is not multilingual: leave it out")
        if getattr(config, "no_timestamps_token_id", None) is not None:
            prefix.append(torch.full((batch,), config.no_timestamps_token_id, device=device))
        return torch.stack(prefix, dim=1)

    @torch.no_grad()
    def generate_hypothesis(self, encoder_outputs: BaseModelOutput, prefix_ids: torch.LongTensor, **kwargs):
        """Whisper's text tokens `(batch, n)`, greedy unless `kwargs` say otherwise, right-padded with end of text."""
        config = self.speech_model.generation_config
        end = self.speech_model.config.eos_token_id
        vocabulary = self.speech_model.config.vocab_size
        prefix = prefix_ids.shape[1]
        most = kwargs.pop("max_new_tokens", self.speech_model.config.max_target_positions - prefix)
        suppressed = {token for token in config.suppress_tokens or [] if token != end}
        generation_config = GenerationConfig(
            decoder_start_token_id=config.decoder_start_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
            max_length=prefix + most,
            # Text tokens come before the end of text, all markers and times after it.
            suppress_tokens=sorted(suppressed | set(range(end + 1, vocabulary))) or None,
            begin_suppress_tokens=config.begin_suppress_tokens,
            **kwargs,
        )
        with room_for_graphs(kwargs.get("cache_implementation") == "static"):
            ids = GenerationMixin.generate(
                self.speech_model,
                inputs=encoder_outputs.last_hidden_state,  # for its batch and device
                encoder_outputs=encoder_outputs,
                attention_mask=torch.ones_like(prefix_ids),
                decoder_input_ids=prefix_ids,
                generation_config=generation_config,
            )[:, prefix:]
        longest = int((ids != end).sum(-1).max()) if ids.numel() else 0
        return ids[:, :longest]

    @torch.no_grad()
    def get_audio_states(
        self, encoder_outputs: BaseModelOutput, prefix_ids: torch.LongTensor, hypothesis_ids: torch.LongTensor
    ) -> VoxKrikriAudio:
        """A: the last decoder states that predict every hypothesis token and then the end, in one parallel pass."""
        lengths = (hypothesis_ids != self.speech_model.config.eos_token_id).sum(-1)
        decoder_output = self.speech_model.model.decoder(
            input_ids=torch.cat([prefix_ids, hypothesis_ids], dim=-1),
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            use_cache=False,
        )
        states = decoder_output.last_hidden_state[:, prefix_ids.shape[1] - 1 :]
        return VoxKrikriAudio(hypothesis_ids=hypothesis_ids, audio_states=states, state_lengths=lengths + 1)

    @torch.no_grad()
    def listen(
        self,
        input_features: torch.FloatTensor,
        language: str | None = None,
        hypothesis_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> VoxKrikriAudio:
        """Whisper's whole part: features `(batch, mel bins, frames)` to hypothesis and states.

        Args:
            hypothesis_ids: take these, made earlier, instead of decoding them now.
            kwargs: decoding options of the hypothesis, greedy by default.
        """
        kwargs |= self.caching_options(**kwargs)
        if self.speech_is_offloaded:
            kwargs["disable_compile"] = True  # its weights lie elsewhere every time
        with self._speech_at_hand():
            input_features = input_features.to(execution_device(self.speech_model), self.speech_model.dtype)
            encoder_outputs = self.speech_model.model.encoder(input_features)
            prefix_ids = self.speech_prefix(encoder_outputs, language)
            if hypothesis_ids is None:
                hypothesis_ids = self.generate_hypothesis(encoder_outputs, prefix_ids, **kwargs)
            audio = self.get_audio_states(encoder_outputs, prefix_ids, hypothesis_ids.to(prefix_ids.device))
        return VoxKrikriAudio(**{name: value.to(self.device) for name, value in audio.items()})

    def offload_speech(self) -> None:
        """Keeps Whisper in the CPU's memory; only while it listens a copy of it lies beside the LLM.

        Raises:
            ValueError: where accelerate has placed Whisper already.
        """
        if any(hasattr(module, "_hf_hook") for module in self.speech_model.modules()):
            raise ValueError("offload_speech() places Whisper itself: load with a device_map of one device for it")
        self.speech_model.to("cpu")
        if torch.cuda.is_available():  # page-locked memory is copied several times faster
            for tensor in (*self.speech_model.parameters(), *self.speech_model.buffers()):
                tensor.data = tensor.data.pin_memory()
        self.speech_is_offloaded = True

    @contextmanager
    def _speech_at_hand(self) -> Iterator[None]:
        tensors = [*self.speech_model.parameters(), *self.speech_model.buffers()] if self.speech_is_offloaded else []
        kept = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data

    def caching_options(self, generation_config: GenerationConfig | None = None, **kwargs) -> dict:
        """What `kwargs` of generate or else the generation configuration say of caches: for Whisper and the LLM alike."""
        config = generation_config or self.generation_config
        options = {name: kwargs.get(name, getattr(config, name, None)) for name in CACHING_OPTIONS}
        if options["cache_implementation"] not in (None, "dynamic", "static"):
            raise ValueError(
                f'cache_implementation must be "dynamic" or "static", got {options["cache_implementation"]!r}'
            )
        return options

    def text_rows(
        self, input_ids: torch.LongTensor, prompt_length: int, hypothesis_ids: torch.LongTensor | None
    ) -> dict[str, torch.LongTensor]:
        """Where the rows of a text being decoded stand: t, and how far it has followed the hypothesis; each `(batch, rows)`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) - (prompt_length - 1)
        positions = positions.clamp(min=-1).expand_as(input_ids)
        reached = self.follow_hypothesis(input_ids, positions, hypothesis_ids)
        return {"text_positions": positions, "text_reached": reached}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        prompt_length: int | None = None,
        hypothesis_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if prompt_length is not None:
            count = inputs["input_ids"].shape[1]
            rows = self.text_rows(input_ids, prompt_length, hypothesis_ids)
            inputs |= {name: value[:, -count:] for name, value in rows.items()} | {"hypothesis_ids": hypothesis_ids}
        return inputs

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        *,
        audio_states: torch.FloatTensor | None = None,
        state_lengths: torch.LongTensor | None = None,
        hypothesis_ids: torch.LongTensor | None = None,
        hypothesis_token_counts: torch.LongTensor | None = None,
        fusion_mode: str | None = None,
        alignment_lookahead: int | None = None,
        copy_bias: float | None = None,
        language: str | None = None,
        draft_ids: torch.LongTensor | None = None,
        draft_word_starts: torch.BoolTensor | None = None,
        draft_min_probability: float | None = None,
        return_dict_in_generate: bool = False,
        **kwargs,
    ) -> torch.LongTensor | VoxKrikriGenerateOutput:
        """Transcribes clips.

        Args:
            input_features: `(batch, mel bins, frames)`, or instead
            audio_states, state_lengths, hypothesis_ids: what `listen` returned.
            input_ids, attention_mask: `(batch, prompt)`, left-padded; the LLM's start token alone if left out.
            hypothesis_token_counts: `(batch,)`, T: the hypothesis's LLM tokens and its end. Left out, S/T is the
                checkpoint's constant `states_per_token`.
            fusion_mode, alignment_lookahead, copy_bias: instead of the configuration's.
            language: of the speech, for a multilingual Whisper.
            draft_ids, draft_word_starts: what the processor's `draft` makes of the hypotheses. Greedy decoding writes
                the same tokens with any draft or none, with a good one in fewer passes of the LLM.
            draft_min_probability: relaxed acceptance: take a draft token to which the LLM gives this probability, even
                where another is likelier. Fewer passes, and another text than greedy decoding's.
            kwargs: transformers' generation options (num_beams, do_sample, max_new_tokens, streamer ...). With
                cache_implementation="static" shapes stay the same and, on an accelerator, Whisper's steps and the passes
                of greedy decoding are compiled, the first time that a batch of this size is seen.

        Returns:
            `(batch, tokens)` new text tokens, or a VoxKrikriGenerateOutput.

        Raises:
            ValueError: without audio, with both kinds of it, or with a prompt for another number of clips.
        """
        if (input_features is None) == (audio_states is None):
            raise ValueError("generate needs either input_features or audio_states (with state_lengths), one of them")
        if audio_states is None:
            audio = self.listen(input_features, language, hypothesis_ids, **self.caching_options(**kwargs))
        else:
            if state_lengths is None:
                state_lengths = torch.full((len(audio_states),), audio_states.shape[1], device=audio_states.device)
            audio = VoxKrikriAudio(
                hypothesis_ids=hypothesis_ids, audio_states=audio_states, state_lengths=state_lengths
            )
        batch = len(audio.audio_states)
        if input_ids is None:
            input_ids = torch.full((batch, 1), self.start_token_id, device=self.device)
        elif len(input_ids) != batch:
            raise ValueError(f"input_ids holds {len(input_ids)} prompts for {batch} clips: give one for each")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        prompt_length = input_ids.shape[1]
        mode = self.config.fusion_mode if fusion_mode is None else fusion_mode
        keys, values = self.project_audio(audio.audio_states)
        alignment = {
            "state_lengths": audio.state_lengths,
            "hypothesis_ids": audio.hypothesis_ids,
            "hypothesis_token_counts": hypothesis_token_counts,
        }
        caching = self.caching_options(**kwargs)
        config = kwargs.get("generation_config") or self.generation_config
        beams, sampling = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "do_sample"))
        greedy = (beams or 1) == 1 and not sampling
        if greedy:
            kwargs["custom_generate"] = partial(
                greedy_search,
                streamer=kwargs.get("streamer"),  # transformers keeps it to itself
                draft_ids=draft_ids,
                draft_word_starts=draft_word_starts,
                draft_min_probability=draft_min_probability,
                static_cache=caching["cache_implementation"] == "static",
            )
        elif mode == "causal":
            processor = NoEndBeforeLastState(self, prompt_length, alignment_lookahead, alignment)
            kwargs["logits_processor"] = LogitsProcessorList([*kwargs.get("logits_processor", []), processor])
        output = super().generate(
            inputs=input_ids,  # for its batch and device; by its name alone transformers would not know it
            input_ids=input_ids,
            attention_mask=attention_mask,
            prompt_length=prompt_length,
            audio_keys=keys,
            audio_values=values,
            fusion_mode=mode,
            alignment_lookahead=alignment_lookahead,
            copy_bias=self.config.copy_bias if copy_bias is None else copy_bias,
            return_dict_in_generate=True,
            output_scores=return_dict_in_generate and not greedy,
            **alignment,
            **kwargs
            | caching
            | {"cache_implementation": None},  # the static cache is ours, and greedy decoding's alone
        )
        sequences = output.sequences[:, prompt_length:]
        if not return_dict_in_generate:
            return sequences
        if greedy:
            counts = {name: output[name] for name in ("token_logprobs", "passes", "drafted", "accepted")}
            return VoxKrikriGenerateOutput(sequences=sequences, **counts, **audio)
        token_logprobs = self.compute_transition_scores(
            output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
        )
        ends = torch.isin(sequences, torch.tensor(self.end_token_ids, device=sequences.device))
        token_logprobs = token_logprobs.masked_fill(ends.cumsum(-1) - ends.int() > 0, 0.0)
        return VoxKrikriGenerateOutput(sequences=sequences, token_logprobs=token_logprobs, **audio)
