"""The one object for users: `asr = pipeline("automatic-speech-recognition", model=..., trust_remote_code=True)`."""

import os
from collections.abc import Iterator, Sequence

from transformers import AutomaticSpeechRecognitionPipeline, PreTrainedModel, ProcessorMixin

from .processing_voxkrikri import SAMPLE_RATE, is_collection, load_audio
from .transcription_voxkrikri import transcribe_each


class VoxKrikriPipeline(AutomaticSpeechRecognitionPipeline):
    """Greek speech to text, for clips of any length, one or many.

    transformers' own speech pipeline feeds a model features and no more; this one asks Whisper first and the LLM then
    (`transcription_voxkrikri`), and decodes greedily unless told otherwise.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False  # else the stock defaults (five beams, 256 tokens) would be passed on

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None, batch_size: int = 1, **kwargs):
        separate = [name for name in ("tokenizer", "feature_extractor") if kwargs.get(name) is not None]
        if processor is None or separate:
            raise ValueError(
                f"VoxKrikriPipeline takes its processor whole, got {' and '.join(separate) or 'none'}: pass only "
                "processor=AutoProcessor.from_pretrained(<folder or Hub id>, trust_remote_code=True)"
            )
        self.batch_size = batch_size
        super().__init__(model, processor=processor, **kwargs)
        self.type = "seq2seq"

    def __call__(self, inputs, batch_size: int | None = None, **kwargs) -> dict | list[dict] | Iterator[dict]:
        """Transcribes one clip or many.

        Args:
            inputs: a clip in any form that `load_audio` takes (path, bytes, samples with their rate, dict, decoder),
                or many: a list or a column of a dataset (the result is a list), or a generator or anything else that
                yields clips (the result yields, reading ahead no further than a batch).
            batch_size: windows decoded together.
            kwargs: `sampling_rate` of samples in Hz; `language`; `prompt`, text that the LLM reads first;
                `generate_kwargs`, or its entries themselves, for `model.generate`; and what to return beside the text:
                `return_hypothesis=True`, Whisper's own text; `return_timestamps=True`, "chunks" with "text" and
                "timestamp" (start, end) in seconds; `return_segments=True`, the whole result as
                `transcription_voxkrikri` describes it.

        Returns:
            {"text": ...} with what was asked for, for each clip.
        """
        given = (self._preprocess_params, self._forward_params, self._postprocess_params)
        params = [old | new for old, new in zip(given, self._sanitize_parameters(**kwargs), strict=True)]
        loading, generating, returning = params
        many = is_collection(inputs)
        if not many:  # loaded here, so that an error does not speak of a first clip among many
            inputs, loading = [load_audio(inputs, **loading)], {"sampling_rate": SAMPLE_RATE}
        results = transcribe_each(
            self.model,
            self.processor,
            inputs,
            batch_size=self.batch_size if batch_size is None else batch_size,
            **loading,
            **generating,
        )
        outputs = (self.postprocess(result, **returning) for result in results)
        if not many:
            return next(outputs)
        return list(outputs) if isinstance(inputs, Sequence) else outputs

    def _sanitize_parameters(
        self,
        sampling_rate: int | None = None,
        generate_kwargs: dict | None = None,
        return_hypothesis: bool | None = None,
        return_timestamps: bool | None = None,
        return_segments: bool | None = None,
        **more_generate_kwargs,
    ) -> tuple[dict, dict, dict]:
        if return_timestamps not in (None, False, True):
            raise ValueError(f"return_timestamps may be True, for segments; {return_timestamps!r} is not known yet")
        chunking = sorted({"chunk_length_s", "stride_length_s"} & more_generate_kwargs.keys())
        if chunking:
            raise ValueError(f"leave out {' and '.join(chunking)}: long audio is split at its quietest points anyway")
        returning = {
            "return_hypothesis": return_hypothesis,
            "return_timestamps": return_timestamps,
            "return_segments": return_segments,
        }
        return (
            {} if sampling_rate is None else {"sampling_rate": sampling_rate},
            {**(generate_kwargs or {}), **more_generate_kwargs},
            {name: value for name, value in returning.items() if value is not None},
        )

    def postprocess(
        self,
        result: dict,
        return_hypothesis: bool = False,
        return_timestamps: bool = False,
        return_segments: bool = False,
    ) -> dict:
        output = dict(result) if return_segments else {"text": result["text"]}
        if return_hypothesis:
            output["hypothesis"] = result["hypothesis"]
        if return_timestamps:
            output["chunks"] = [
                {"text": segment["text"], "timestamp": (segment["start"], segment["end"])}
                for segment in result["segments"]
            ]
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves model and whole processor; transformers' own would leave Whisper's tokenizer out."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
