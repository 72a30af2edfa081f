"""The page: its limits and its diff by themselves, then the whole of it in a browser."""

import gradio
import numpy as np
import pytest
import soundfile
from transformers import pipeline

import app


def test_word_diff_keeps_every_word_of_both_texts_in_order():
    hypothesis, text = "ο σκίλος γάβγιζε τι νύχτα", "ο σκύλος γάβγιζε όλη τη νύχτα"
    runs = app.word_diff(hypothesis, text)
    assert "".join(words for words, label in runs if label != "VoxKrikri").split() == hypothesis.split()
    assert "".join(words for words, label in runs if label != "Whisper").split() == text.split()
    assert ("σκίλος ", "Whisper") in runs and ("σκύλος ", "VoxKrikri") in runs


def test_word_diff_of_the_same_text_and_of_none():
    assert app.word_diff("το ίδιο", "το ίδιο") == [("το ίδιο ", None)]
    assert app.word_diff("", "") == []


def test_a_long_recording_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(8_000 * (app.LONGEST + 1)), 8_000)
    with pytest.raises(gradio.Error, match="takes up to 120 s"):
        app.check_duration(str(path))


@pytest.mark.system
def test_the_page_transcribes_an_upload_in_a_browser(tiny, clips, tmp_path):
    from playwright.sync_api import sync_playwright

    path = tmp_path / "clip.wav"
    soundfile.write(path, clips[1], 16_000)
    asr = pipeline("automatic-speech-recognition", model=str(tiny.folder), trust_remote_code=True)
    expected = asr(str(path), return_hypothesis=True, generate_kwargs={"fusion_mode": "causal"})
    page_app = app.build(asr)
    _, address, _ = page_app.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
            page = browser.new_page()
            page.set_default_timeout(120_000)  # milliseconds; a busy machine is slow, not wrong
            page.goto(address)
            page.get_by_role("button", name="Transcribe").click()
            page.get_by_text("There is no recording yet").wait_for()
            page.locator("input[type=file]").first.set_input_files(path)
            page.locator(".waveform-container, wave, audio").first.wait_for(state="attached")
            page.get_by_label("Causal").check()
            page.get_by_role("button", name="Transcribe").click()
            hypothesis = page.get_by_label("Whisper's hypothesis")
            page.wait_for_function("box => box.value != ''", arg=hypothesis.element_handle())
            assert hypothesis.input_value() == expected["hypothesis"]
            assert page.get_by_label("VoxKrikri", exact=True).input_value() == expected["text"]
            browser.close()
    finally:
        page_app.close()
