"""A page that transcribes: upload or record, and see what the LLM changed in Whisper's hypothesis.

    python app.py                       # the mini of this repository
    MODEL_ID=you/your-voxkrikri python app.py

It knows the model through `pipeline(...)` alone: in a Space it stands in a repository of its own.
"""

import os
from difflib import SequenceMatcher
from pathlib import Path

import gradio as gr
import soundfile
from transformers import pipeline


ROOT = Path(__file__).parent
LONGEST = 120  # seconds
LARGEST = "25mb"
MODES = {"Full: sees the whole clip": "full", "Causal: as in a stream": "causal"}


def word_diff(hypothesis: str, text: str) -> list[tuple[str, str | None]]:
    """Runs of words for gr.HighlightedText: (words, None where both agree, else "Whisper" or "VoxKrikri")."""
    old, new = hypothesis.split(), text.split()
    runs = []
    for kind, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            runs.append((" ".join(new[new_start:new_end]) + " ", None))
            continue
        if old_end > old_start:
            runs.append((" ".join(old[old_start:old_end]) + " ", "Whisper"))
        if new_end > new_start:
            runs.append((" ".join(new[new_start:new_end]) + " ", "VoxKrikri"))
    return runs


def check_duration(path: str) -> None:
    try:
        duration = soundfile.info(path).duration
    except soundfile.SoundFileError:
        return  # another format: the pipeline reads it or says what is wrong
    if duration > LONGEST:
        raise gr.Error(
            f"This recording lasts {duration:.0f} s; this page takes up to {LONGEST} s. Cut out a part of it."
        )


def build(asr) -> gr.Blocks:
    """The page around a VoxKrikri pipeline."""

    def transcribe(path: str | None, mode: str) -> tuple[str, str, list]:
        if path is None:
            raise gr.Error("There is no recording yet: upload a file or record one.")
        check_duration(path)
        try:
            result = asr(path, return_hypothesis=True, generate_kwargs={"fusion_mode": MODES[mode]})
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return result["hypothesis"], result["text"], word_diff(result["hypothesis"], result["text"])

    with gr.Blocks(title="VoxKrikri") as page:
        gr.Markdown(
            "# VoxKrikri\nGreek speech to text: a frozen Whisper's decoder states, fused into a language model. "
            f"Up to {LONGEST} seconds, {LARGEST.upper()}."
        )
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Recording")
                mode = gr.Radio(list(MODES), value=next(iter(MODES)), label="Fusion")
                button = gr.Button("Transcribe", variant="primary")
            with gr.Column():
                hypothesis = gr.Textbox(label="Whisper's hypothesis", lines=2)
                text = gr.Textbox(label="VoxKrikri", lines=2)
                changes = gr.HighlightedText(
                    label="What changed",
                    combine_adjacent=False,
                    show_legend=True,
                    color_map={"Whisper": "#e8a0a0", "VoxKrikri": "#98d098"},
                )
        inputs, outputs = [audio, mode], [hypothesis, text, changes]
        button.click(transcribe, inputs, outputs, api_name="transcribe")
        examples = sorted(str(path) for path in (ROOT / "examples").glob("*.flac"))
        if examples:
            gr.Examples([[path, next(iter(MODES))] for path in examples], inputs, cache_examples=False)
    return page.queue(max_size=20)


def main() -> None:
    model = os.environ.get("MODEL_ID", str(ROOT))
    asr = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True)
    build(asr).launch(max_file_size=LARGEST)


if __name__ == "__main__":
    main()
