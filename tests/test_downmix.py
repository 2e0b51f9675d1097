"""Tests how several channels become one: the first for LTU, the mean of all for LTU-AS."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim

from data import prepare_audio
from ltu.data import audio
from ltu.data.audio import AudioError, decode_audio, load_audio
from ltu.data.check_examples import check_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu_as import extract_whisper_feature
from ltu_as.convert_checkpoint import main as convert_as
from ltu_as.feature_store import FeatureStore
from tests import tiny
from tests.test_serve import QUESTION, audio_part, serve, text_part
from tests.whisper_tiny import save_whisper

# The bound of the golden numbers of features.
BOUND = 1e-4


def write_channels(path: Path, channels: int = 2, rate: int = 44_100) -> Path:
    """Write a clip of 1.5 s whose channels are two sounds, of 16 bits."""
    samples = [tiny.clip(seed, 1.5 * rate / 16_000) for seed in range(channels)]
    soundfile.write(path, np.stack(samples, axis=1), rate, subtype="PCM_16")
    return path


def mean_by_soundfile(path: Path) -> np.ndarray:
    """Return the mean of the channels at 16 kHz (samples,), by stock libraries only."""
    samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    mean = torch.from_numpy(samples.mean(axis=1)).float()  # (samples,)
    return torchaudio.functional.resample(mean, rate, 16_000).numpy()


def features_by_whisper(waveform: np.ndarray, model: whisper.Whisper) -> torch.Tensor:
    """Return pooled features (layers, 25, width) of a waveform, by hooks in stock Whisper."""
    layers = []
    hooks = []
    for block in model.encoder.blocks:
        hooks.append(block.register_forward_hook(lambda _, __, out: layers.append(out[0])))
    # The encoder takes 30 s only, so its positions are cut to those of 10 s.
    positions = model.encoder.positional_embedding
    model.encoder.positional_embedding = positions[:500]
    try:
        mel = pad_or_trim(log_mel_spectrogram(waveform, model.dims.n_mels), 1000)
        with torch.no_grad():
            model.encoder(mel[None])
    finally:
        model.encoder.positional_embedding = positions
        for hook in hooks:
            hook.remove()
    return torch.stack(layers).unflatten(1, (25, 20)).mean(2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("downmix")
    llm = tiny.write_llm(root / "llm")
    save_whisper(root / "whisper.pt")
    flags = f"--init --llm {llm} --whisper {root}/whisper.pt --num_layer_heads 2"
    convert_as(f"{flags} --feature_precision fp32 --output_dir {root}/ltu_as".split())
    tiny.write_checkpoint(root / "ltu", llm)
    return {name: root / name for name in ("ltu", "ltu_as", "whisper.pt")}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, LtuEngine]:
    opened = {}
    for kind in ("ltu", "ltu_as"):
        opened[kind] = LtuEngine.from_pretrained(folders[kind], device="cpu")
    return opened


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("kind", ["path", "bytes", "array"])
def test_whisper_gets_the_mean(folders, engines, tmp_path, channels, rate, kind):
    """Features equal those of stock soundfile, torchaudio and Whisper of the mean of channels."""
    path = write_channels(tmp_path / "a.wav", channels, rate)
    samples = soundfile.read(path, dtype="int16")[0]
    source = {"path": path, "bytes": path.read_bytes(), "array": (samples.T, rate)}[kind]
    front_end = engines["ltu_as"].processor.front_end
    clip = front_end.load_clip(source)
    expected = mean_by_soundfile(path)
    assert np.abs(clip.waveform - expected).max() < 1e-6
    assert clip.channels == channels
    stock = features_by_whisper(expected, whisper.load_model(str(folders["whisper.pt"]), "cpu"))
    features = front_end.extract_features([clip])[0]
    assert (features - stock).abs().max() < BOUND
    first = front_end.extract_features([front_end.load_clip(load_audio(source))])[0]
    assert (first - stock).abs().max() > 100 * BOUND  # The old rule is another answer.


def test_ltu_gets_the_first(engines, tmp_path):
    path = write_channels(tmp_path / "a.wav", rate=16_000)
    clip = engines["ltu"].processor.front_end.load_clip(path)
    assert np.array_equal(clip.waveform, soundfile.read(path, dtype="float32")[0][:, 0])


def test_blocks_are_mixed_as_the_whole(tmp_path, monkeypatch):
    path = write_channels(tmp_path / "a.wav", 3)
    samples, rate = soundfile.read(path, dtype="float32")
    whole = load_audio(path, "mean")
    monkeypatch.setattr(audio, "BLOCK", 1501)
    assert np.abs(load_audio(path, "mean") - whole).max() < 1e-6
    assert np.abs(load_audio((samples.T, rate), "mean") - whole).max() < 1e-6


def test_every_way_into_ltu_as_mixes(folders, engines, tmp_path):
    """A stereo file has the answer, the transcript and the features of the file of its mean."""
    engine = engines["ltu_as"]
    stereo = write_channels(tmp_path / "a.wav", rate=16_000)
    mono = tmp_path / "b.wav"
    soundfile.write(mono, mean_by_soundfile(stereo), 16_000, subtype="FLOAT")
    decoded = decode_audio(stereo, downmix=engine.processor.front_end.downmix)
    sources = [stereo, stereo.read_bytes(), decoded, mono]
    answers = engine([Request("What is it?", source) for source in sources], max_new_tokens=8)
    for answer in answers[:-1]:
        assert (answer.text, answer.transcript) == (answers[-1].text, answers[-1].transcript)
    batches = []
    for path in (stereo, mono):
        content = [{"type": "audio", "path": str(path)}, {"type": "text", "text": "What?"}]
        batch = engine.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            padding=True,
        )
        batches.append(batch["input_features"])
    assert torch.equal(*batches)

    examples = [{"instruction": "What?", "audio_id": path.name} for path in (stereo, mono)]
    (tmp_path / "rows.json").write_text(json.dumps(examples))
    flags = f"--data_path {tmp_path}/rows.json --model {folders['ltu_as']}"
    extract_whisper_feature.main(f"{flags} --output_dir {tmp_path}/features".split())
    store = FeatureStore(tmp_path / "features")
    assert store.description["channels"] == "mean"
    mixed, expected = store.read("a.wav"), store.read("b.wav")
    assert torch.allclose(mixed.features, expected.features, atol=1e-5)
    assert mixed.transcript == expected.transcript


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_the_server_follows_the_rule_of_its_model(engines, tmp_path, kind):
    """The reply is that about a file with the one channel that the model takes."""
    stereo = write_channels(tmp_path / "a.wav", rate=16_000)
    channel = mean_by_soundfile(stereo) if kind == "ltu_as" else load_audio(stereo)
    expected = engines[kind]([Request(QUESTION, channel)], max_new_tokens=12)[0]
    with serve(engines[kind]) as served:
        reply = served.ask(text_part(), audio_part(stereo.read_bytes(), "wav"))
    assert reply.choices[0].message.content == expected.text
    assert reply.model_extra["ltu"]["transcript"] == expected.transcript
    assert reply.model_extra["ltu"]["channels"] == 2


def test_features_of_the_first_channel_are_noticed(folders, tmp_path):
    """A folder of an older version is read with a warning, and nothing is added to it."""
    front_end = LtuEngine.from_pretrained(folders["ltu_as"], device="cpu").processor.front_end
    description = front_end.feature_extractor.describe()
    old = {key: value for key, value in description.items() if key != "channels"}
    FeatureStore.create(tmp_path / "old", old)
    with pytest.warns(UserWarning, match="those of the first channel"):
        front_end.configure(feature_root=str(tmp_path / "old"))
    with pytest.raises(ValueError, match="channels None there, mean now"):
        FeatureStore.create(tmp_path / "old", description)


def test_the_signal_of_the_mix_counts(tmp_path):
    noise = tiny.clip(0)
    opposite = tmp_path / "opposite.wav"
    soundfile.write(opposite, np.stack([noise, -noise], axis=1), 16_000)
    right = tmp_path / "right.wav"
    soundfile.write(right, np.stack([0 * noise, noise], axis=1), 16_000)
    assert len(load_audio(opposite)) == len(load_audio(right, "mean")) == len(noise)
    with pytest.raises(AudioError, match="every sample of the mean of its channels is") as found:
        load_audio(opposite, "mean")
    assert found.value.reason == "silent"
    with pytest.raises(AudioError, match="every sample of its first channel is"):
        load_audio(right)
    examples = [{"audio": str(opposite)}, {"audio": str(right)}]
    assert list(check_audio(examples)) == [str(right)]
    assert list(check_audio(examples, "mean")) == [str(opposite)]


def test_a_waveform_of_the_other_rule_is_refused(tmp_path):
    stereo = decode_audio(write_channels(tmp_path / "a.wav"))
    with pytest.raises(ValueError, match="is the first of 2 channels, the model takes the mean"):
        decode_audio(stereo, downmix="mean")
    mono = decode_audio(tiny.clip(0))
    assert decode_audio(mono, downmix="mean") is mono


def test_prepared_clips_follow_the_rule(tmp_path, capsys):
    """Another rule prepares clips of several channels again, and no others."""
    source = tmp_path / "in"
    source.mkdir()
    write_channels(source / "stereo.wav", rate=16_000)
    soundfile.write(source / "mono.wav", tiny.clip(5), 16_000)
    run = f"--input {source} --output_dir {tmp_path}/out --workers 1".split()
    assert prepare_audio.main(run) == 0
    left, right = soundfile.read(source / "stereo.wav")[0].T
    prepared = soundfile.read(tmp_path / "out" / "stereo.flac")[0]
    assert np.abs(prepared - left).max() < 1e-9
    before = (tmp_path / "out" / "mono.flac").stat().st_mtime_ns
    assert prepare_audio.main([*run, "--downmix", "mean"]) == 0
    prepared = soundfile.read(tmp_path / "out" / "stereo.flac")[0]
    assert np.abs(prepared - (left + right) / 2).max() <= 2.0**-16 + 1e-9
    assert (tmp_path / "out" / "mono.flac").stat().st_mtime_ns == before
    assert "1 were done before" in capsys.readouterr().out.splitlines()[-1]


def test_the_mean_of_huge_samples_is_refused():
    huge = np.full((2, 16_000), 3e38, np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, huge.T, 16_000, format="WAV", subtype="FLOAT")
    for source in (huge, stream.getvalue()):
        with pytest.raises(AudioError, match="not finite"):
            decode_audio(source, downmix="mean")
