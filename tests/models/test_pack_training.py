"""The scripts that make the shapes pack: a stopped training goes on as if it had not stopped, parts fit each other."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.pack.grammar import Shot, abridge, is_held_out, sample_scenes
from models.pack.oracle import match, read
from models.pack.phrases import VOCABULARY, describe, parse
from models.pack.train.code import CELL, CHANNELS, GROUND, NUMBERS, SCALE, coded
from models.pack.train.denoiser import CONFIG as DENOISER
from models.pack.train.denoiser import build_model, flow_loss
from models.pack.train.fitted import fitted
from models.pack.train.generated import Generated, sampled
from models.pack.train.loop import Training, stream
from models.pack.train.prompts import training_prompts
from models.pack.train.text import TOKENS, WIDTH, build_encoder, build_tokenizer, embed, tokens
from models.pack.train.vae import CONFIG as VAE
from models.pack.train.vae import encode, to_frames, to_pixels, windows
from models.pack.world import render, tracks


def _train(folder: Path, until: int) -> Training:
    torch.manual_seed(0)
    options = argparse.Namespace(folder=folder, minutes=float("inf"), steps=20, learning_rate=1e-2, seed=3, workers=0)
    training = Training("line", torch.nn.Linear(3, 1), options)

    def loss(step: int, data: np.ndarray) -> dict[str, torch.Tensor]:
        given = torch.as_tensor(data) + 0.1 * torch.randn(4, 3)
        return {"error": (training.model(given) - given.sum(dim=1, keepdim=True)).square().mean()}

    training.run(lambda step: stream(3, step).standard_normal((4, 3), dtype=np.float32), loss, until)
    return training


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path):
    whole = _train(tmp_path / "whole", 20)
    _train(tmp_path / "parts", 7)
    assert (tmp_path / "parts" / "line.state.pt").exists()
    parts = _train(tmp_path / "parts", 20)
    assert parts.step == whole.step == 20
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name])
        assert torch.equal(whole.average.weights[name], parts.average.weights[name])


def test_the_tokenizer_knows_the_grammar_and_marks_all_else():
    tokenizer = build_tokenizer()
    known = tokenizer(sorted(VOCABULARY), add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in {token for ids in known for token in ids}
    ids = tokenizer("A red cat.").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "red", "<unk>", ".", "</s>"]


def test_prompts_fit_into_the_tokens_of_the_denoiser():
    tokenizer, rng = build_tokenizer(), stream(0, 0)
    scenes = sample_scenes(rng, 900)
    scenes += [abridge(scene, rng) for scene in scenes]
    lengths = [len(ids) for ids in tokenizer([describe(scene, rng) for scene in scenes]).input_ids]
    assert max(lengths) < TOKENS - 4


def test_embeddings_are_zero_where_there_is_no_token():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    ids, mask = tokens(tokenizer, ["a red circle", ""], torch.device("cpu"))
    made = embed(build_encoder(tokenizer), ids, mask)
    assert made.shape == (2, TOKENS, WIDTH)
    assert (made[0, 4:] == 0).all() and (made[1, 1:] == 0).all() and (made[0, :4] != 0).any(dim=1).all()


def test_the_vae_gives_latents_that_the_denoiser_takes():
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    vae, denoiser = AutoencoderKLWan(**VAE), WanTransformer3DModel(**DENOISER)
    frames, code = coded(sample_scenes(stream(0, 0), 2), range(2))
    latents = encode(vae, frames)
    assert latents.shape == code.shape == (2, CHANNELS, 5, 8, 8)
    loss = flow_loss(denoiser, latents, torch.randn(2, TOKENS, WIDTH))
    assert loss.isfinite() and loss > 0
    assert sum(weight.numel() for weight in denoiser.parameters()) <= 7_500_000


def test_flow_loss_is_nothing_for_the_true_velocity_and_variance_of_noise_for_none():
    latents = torch.zeros(64, 16, 5, 8, 8)

    def truth(mixed: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        # With x = 0 the noise is the mixture over its noise level, and the velocity is the noise.
        return (mixed / (time / 1000)[:, None, None, None, None],)

    assert flow_loss(truth, latents, torch.empty(0)).item() == pytest.approx(0, abs=1e-6)
    nothing = flow_loss(lambda mixed, *_, **__: (torch.zeros_like(mixed),), latents, torch.empty(0))
    assert nothing.item() == pytest.approx(1, abs=0.01)


def test_pixels_come_back_as_they_were():
    frames = render(sample_scenes(stream(0, 1), 2), range(2))
    assert np.array_equal(to_frames(to_pixels(frames, torch.device("cpu"))), frames)


def test_the_code_tells_colours_edges_and_where_figures_are():
    scenes = sample_scenes(stream(0, 2), 6)
    frames, code = coded(scenes, range(6))
    assert np.array_equal(frames, render(scenes, range(6)))
    told = code[:, :, 0] / SCALE
    assert told[:, :GROUND, 3, 3] == pytest.approx(frames[:, 0, 0, 0] / 127.5 - 1, abs=1e-5)
    first = [track for track in tracks(scenes, range(6)) if track.start == 0]
    for track in first:
        assert told[track.clip, NUMBERS, int(track.y[0] // CELL), int(track.x[0] // CELL)] == pytest.approx(1.5)
    ground = frames[:, :1, :1, :1].astype(int)
    shown = np.abs(frames[:, 0].astype(int) - ground[:, 0]).max(axis=3) > 3
    inside = told[:, GROUND : GROUND + 4].reshape(6, 2, 2, 8, 8).transpose(0, 3, 1, 4, 2).reshape(6, 16, 16) > 1.2
    assert inside.any() and (shown.reshape(6, 16, 4, 16, 4).any(axis=(2, 4)) | ~inside).all()
    for at in range(6):
        y, x = np.mgrid[0:8, 0:8] * CELL + CELL / 2
        away = [np.hypot(x - each.x[0], y - each.y[0]) > 22 for each in first if each.clip == at]
        assert (told[at, NUMBERS:, np.logical_and.reduce(away)] == 0).all()


def test_the_code_of_a_latent_frame_is_told_by_its_own_frames_alone():
    scenes = sample_scenes(stream(0, 3), 3, kinds=("one",), image=True)
    still = [replace(scene, shots=(_standing(scene.shots[0]),)) for scene in scenes]
    clips = coded(still, range(3))[1]
    assert clips.shape == (3, CHANNELS, 5, 8, 8)
    assert np.allclose(clips, clips[:, :, :1])


def _standing(shot: Shot) -> Shot:
    return replace(shot, figures=tuple(replace(figure, motion="still") for figure in shot.figures))


def test_a_window_has_the_code_of_its_own_pixels():
    frames, code = coded(sample_scenes(stream(0, 4), 4), range(4))
    shown, told = windows(frames, code, stream(0, 5))
    assert shown.shape == (4, 17, 32, 32, 3) and told.shape == (4, CHANNELS, 5, 4, 4)
    for clip, each in zip(shown, told, strict=True):
        places = [
            (y, x)
            for whole, its in zip(frames, code, strict=True)
            for y in range(5)
            for x in range(5)
            if np.array_equal(whole[:, CELL * y : CELL * y + 32, CELL * x : CELL * x + 32], clip)
            and np.array_equal(its[:, :, y : y + 4, x : x + 4], each)
        ]
        assert places


def test_a_code_is_the_clip_that_its_numbers_tell():
    scenes = sample_scenes(stream(0, 6), 12)
    frames, code = coded(scenes, range(12))
    for at, scene in enumerate(scenes):
        clip = fitted(code[at], scene, stream(0, 7))
        assert clip is not None
        assert np.square(clip.astype(float) - frames[at]).mean() < 6.5  # 40 dB
        assert match(read(clip), scene) == match(read(frames[at]), scene)
        spoilt = code[at].copy()
        spoilt[GROUND:NUMBERS] = 0
        assert np.array_equal(fitted(spoilt, scene, stream(0, 7)), clip)  # depths are not asked


def test_a_code_of_another_scene_fits_no_clip():
    scenes = sample_scenes(stream(0, 8), 12, kinds=("one",))
    _, code = coded(scenes, range(12))
    for at, scene in enumerate(scenes):
        assert fitted(code[at - 1], scene, stream(0, 9)) is None
        assert fitted(np.zeros_like(code[at]), scene, stream(0, 9)) is None


def test_what_the_denoiser_makes_comes_back_with_the_clips_that_fit(tmp_path: Path):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(tokenizer, tmp_path / "none").eval()
    scenes = sample_scenes(stream(4, 0), 3)
    made = sampled(model, tokenizer, scenes, stream(4, 1), guidance=2.0)
    assert made.shape == (3, CHANNELS, 5, 8, 8)
    frames, latents = coded(scenes, range(3))
    told = [describe(scene) for scene in scenes]
    np.savez(tmp_path / "0000.npz", scenes=told, latents=latents, fits=[True, False, True], frames=frames[[0, 2]])
    found = Generated(tmp_path)
    assert found.scenes == scenes
    shown, again = found.batch(stream(4, 2), 8)
    rows = [int(np.flatnonzero((latents == each).all(axis=(1, 2, 3, 4)))[0]) for each in again]
    assert set(rows) == {0, 2}
    assert np.array_equal(shown, frames[rows])


def test_a_students_prompts_are_distinct_and_of_the_training_split() -> None:
    prompts = training_prompts(400)
    assert len(set(prompts)) == 400
    scenes = [scene for scene in map(parse, prompts) if scene]
    assert len(scenes) == 400
    whole = [
        scene for scene in scenes if all(figure.motion for figure in scene.figures)
    ]  # what is unsaid is in no trio
    assert len(whole) > 300 and not any(map(is_held_out, whole))
    assert 0.4 < sum(scene.kind == "two" for scene in scenes) / len(scenes) < 0.6
