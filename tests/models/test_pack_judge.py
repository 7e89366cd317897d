"""The shapes pack's judge: what it is taught is right, and what is exported answers as it was taught."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import COLOURS, SHAPES, Scene, flaw, keeps, sample_scenes
from models.pack.marks import marks
from models.pack.phrases import VOCABULARY, parse
from models.pack.train import questions
from models.pack.train.eyes import VISION, Eyes, lesson, losses, to_pixel_values
from models.pack.train.flaws import FLAWS, Decoded, damaged, decoded, packed, spoilt
from models.pack.train.judge import SHOWN, _last_tokens, coded_lesson, sheets, track_of
from models.pack.train.judge import lesson as judge_lesson
from models.pack.train.judge import losses as judge_losses
from models.pack.train.judge_code import CODE, FIGURE, GAIN, patch_codes, token_codes
from models.pack.train.judge_exam import auroc, ece
from models.pack.train.judge_model import TEXT, build_model, build_processor, build_tokenizer, export
from models.pack.train.loop import stream
from models.pack.train.questions import HEAD, TAIL, Asked, as_rendered, ask, attribute, caption, changed
from models.pack.train.vae import CONFIG as VAE
from models.pack.world import RADII, render
from stages.caption import INSTRUCTIONS, VERIFY
from stages.rubric import load_rubric


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture(scope="module")
def exported(tokenizer, untrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    export(untrained["judge"], tokenizer, folder)
    return folder


def _scenes(count: int, place: int = 0) -> list[Scene]:
    return sample_scenes(stream(place, 0), count)


def test_the_judge_learns_the_questions_that_a_run_asks():
    asked = {question.name: question.text for question in load_rubric("default").questions}
    assert asked == {
        "prompt_match": HEAD + "{prompt}" + TAIL,
        "no_artefacts": questions.NO_ARTEFACTS,
        "motion_smooth": questions.MOTION_SMOOTH,
    }
    assert (INSTRUCTIONS["short"], INSTRUCTIONS["dense"]) == (questions.SHORT, questions.DENSE)
    assert VERIFY.format(media="{media}", statement="") == HEAD + TAIL


def test_the_tokenizer_knows_every_word_of_the_questions_and_of_the_grammar(tokenizer):
    texts = [question.format("a red circle", 17) for question in load_rubric("default").questions]
    texts += [INSTRUCTIONS[style].format(media=media) for style in ("short", "dense") for media in questions.MEDIA]
    texts += [one.head + one.text for scene in _scenes(60) for one in ask(as_rendered(scene), stream(1, 0))]
    known = tokenizer([*texts, " ".join(VOCABULARY)], add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in {token for ids in known for token in ids}
    assert tokenizer.convert_ids_to_tokens(tokenizer("Yes, a cat.").input_ids) == ["yes", ",", "a", "<unk>", "."]


def test_answers_about_descriptions_are_those_of_the_oracle():
    rng, scenes = stream(2, 0), _scenes(15)
    answers = []
    for scene, clip in zip(scenes, render(scenes, range(15)), strict=True):
        for one in ask(as_rendered(scene), rng):
            if one.text.endswith(TAIL) or one.head:
                prompt = one.text.removesuffix(TAIL).removesuffix("?")
                assert one.answer == questions.yes_no(bool(marks(clip, prompt)["prompt_match"])), prompt
                answers.append(one.answer)
    assert 0.3 < answers.count("Yes") / len(answers) < 0.7


def test_a_changed_scene_is_another_one_of_the_world():
    rng = stream(3, 0)
    for scene in _scenes(200):
        other = changed(scene, rng)
        assert flaw(other) is None
        assert not keeps(scene, other) or len(other.figures) < len(scene.figures)


def test_captions_say_the_whole_scene_in_one_order():
    for scene in _scenes(60):
        for dense in (False, True):
            said = parse(caption(scene, dense=dense))
            assert said is not None
            assert keeps(said, scene)
        turned = Scene(tuple(type(shot)(shot.figures[::-1], shot.background) for shot in scene.shots))
        assert caption(turned) == caption(scene)


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("a small red circle moving right on a white background", "Is the red shape a circle?", "Yes"),
        ("a small red circle moving right on a white background", "Is the circle red?", "Yes"),
        ("a small red circle moving right on a white background", "Is the red shape a star?", "No"),
        ("a small red circle moving right on a white background", "Is the background grey?", "No"),
    ],
)
def test_questions_of_attributes(prompt, text, answer):
    scene = parse(prompt)
    found = {one.text: one.answer for at in range(300) for one in [attribute(scene, stream(4, at), image=False)]}
    assert found[text] == answer


def test_flaws_keep_the_format_and_only_depend_on_their_random_numbers():
    clips = render(_scenes(2), [1, 2])
    for place, each in enumerate(FLAWS):
        made = each(clips[0].astype(np.float32), clips[1].astype(np.float32), stream(5, place))
        assert made.shape == clips[0].shape
    once, again = (spoilt(clips[0], clips[1], stream(5, 99)) for _ in range(2))
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    latents = torch.randn(2, 16, 5, 8, 8)
    assert all(damaged(latents[0], latents[1], stream(6, at)).isfinite().all() for at in range(20))


def test_packed_clips_say_what_the_oracle_sees():
    scenes = _scenes(3)
    clips = render(scenes, range(3))
    clips[1] = stream(7, 0).integers(0, 256, clips[1].shape)
    made = packed(clips, scenes)
    assert keeps(parse(str(made["seen"][0])), scenes[0])
    assert (made["seen"][1], bool(made["clean"][1]), bool(made["smooth"][1])) == ("", False, False)


def test_clips_out_of_a_vae_come_back_with_what_they_show(tmp_path: Path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE).eval()
    made = decoded(vae, stream(10, 0), 3, "train", batch_size=2)
    assert made["frames"].shape == (3, 17, 64, 64, 3)
    np.savez(tmp_path / "0000.npz", **made)
    np.savez(tmp_path / "0001.part.npz", **made)
    found = Decoded(tmp_path)
    assert len(found.frames) == 3
    assert [one.reading.scene for one in found.seen] == [None] * 3  # an untrained decoder shows nothing
    assert all(flaw(one.scene) is None for one in found.seen)
    assert Decoded(tmp_path / "none").frames == []


def test_patches_are_told_what_they_show():
    frames, answers = lesson(stream(8, 0), 4, "train")
    covered = answers["shape"] >= 0
    assert frames.shape[1:] == (64, 64, 3)
    assert np.array_equal(covered, ~np.isnan(answers["turn"][..., 0]) | ~np.isnan(answers["place"][..., 0]))
    patches = frames.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(len(frames), 64, 64, 3).astype(np.float32)
    spread = np.ptp(patches, axis=2).max(axis=-1)
    assert spread[covered].mean() > 3 * spread[~covered].mean()
    model = Eyes()
    told = model(to_pixel_values(frames), torch.arange(64).expand(len(frames), 64))
    whole = model(to_pixel_values(frames))
    assert torch.allclose(told["shape"], whole["shape"], atol=1e-4)
    terms = losses(told, {name: torch.as_tensor(value) for name, value in answers.items()})
    assert all(term.isfinite() for term in terms.values())


def test_tokens_tell_what_the_connector_sums_over_patches(untrained):
    scenes = [parse("a small red circle moving right and a large blue star standing still on a white background")]
    assert scenes[0] is not None
    patches = patch_codes(scenes, [3], np.asarray([0, 16]))
    wanted = token_codes(patches)
    figures = wanted.sum(axis=2)[0, :, : FIGURE * len(COLOURS)].reshape(2, len(COLOURS), FIGURE)
    assert {COLOURS[at] for at in np.flatnonzero(figures[0, :, 0])} == {"red", "blue"}
    assert np.allclose(figures[:, [COLOURS.index("red"), COLOURS.index("blue")], 0], GAIN, atol=1e-4)
    red = figures[:, COLOURS.index("red")]
    assert red[1, 1 + len(SHAPES)] > red[0, 1 + len(SHAPES)] + 1  # further to the right
    connector = copy.deepcopy(untrained["judge"].model.connector)
    states = torch.zeros(2, 64, VISION["hidden_size"])
    states[..., :CODE] = torch.as_tensor(patches[0])
    with torch.no_grad():
        next(connector.parameters()).copy_(torch.eye(TEXT["hidden_size"], VISION["hidden_size"]).repeat(1, 16))
        made = connector(states)[..., :CODE].numpy()
    np.testing.assert_allclose(made, wanted[0], atol=1e-4)


def test_a_lesson_of_codes_asks_what_a_lesson_of_frames_asks(tokenizer, untrained):
    made = coded_lesson(tokenizer, stream(11, 0), 3)
    assert made["tokens"].shape == (3, SHOWN, 4, TEXT["hidden_size"])
    terms = judge_losses(untrained, {name: torch.as_tensor(value) for name, value in made.items()})
    assert {"answers", "captions", "right", "state2", "track4"} <= set(terms)
    assert all(term.isfinite() for term in terms.values())


def test_questions_beside_each_other_are_answered_as_if_asked_alone(tokenizer, untrained, exported):
    scenes = _scenes(2)
    shown = evenly_spaced(render(scenes, range(2)), SHOWN)
    texts = ["a red circle" + TAIL, "a small blue star, then a ring" + TAIL]
    asked = [[*(Asked(HEAD, text, "Yes") for text in texts), Asked("", questions.SHORT, "a ring")]] * 2
    batch = {name: torch.as_tensor(value) for name, value in sheets(tokenizer, asked, SHOWN).items()}
    alone = Multimodal(MultimodalRef(str(exported)))
    with torch.no_grad():
        seen = untrained["judge"].model.vision_model(to_pixel_values(shown.reshape(-1, 64, 64, 3))).last_hidden_state
        embedded = untrained["judge"].get_input_embeddings()(batch["ids"])
        places = (batch["ids"] == untrained["judge"].config.image_token_id)[..., None]
        features = untrained["judge"].model.connector(seen)
        out = untrained["judge"].model.text_model(
            inputs_embeds=embedded.masked_scatter(places, features),
            attention_mask=batch["visible"][:, None],
            position_ids=batch["positions"],
        )
        logits = untrained["judge"].lm_head(out.last_hidden_state[batch["decides"]])
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    beside = torch.softmax(logits[:, [yes, no]], dim=-1)[:, 0].numpy().reshape(2, 2)
    expected = alone.p_yes(shown, [[HEAD + text for text in texts]] * 2)
    np.testing.assert_allclose(beside, expected, atol=2e-3)  # float16 weights on one side
    assert np.ptp(expected) > 0
    ids = batch["ids"][0]
    assert {tokenizer.convert_ids_to_tokens(int(ids[at])) for at in _last_tokens(SHOWN)} == {
        "<fake_token_around_image>"
    }


def test_an_exported_judge_answers_and_captions(exported):
    assert (exported / "chat_template.jinja").exists()
    assert sum(file.stat().st_size for file in exported.iterdir()) < 10e6
    judge = Multimodal(MultimodalRef(str(exported)))
    assert sum(weight.numel() for weight in judge.model.parameters()) < 6e6
    frames = evenly_spaced(render(_scenes(2), range(2)), SHOWN)
    asked = [question.format("a red circle", 17) for question in load_rubric("default").questions]
    p_yes = judge.p_yes(frames, [asked] * 2)
    assert p_yes.shape == (2, 3)
    assert np.all((p_yes > 0) & (p_yes < 1))
    assert judge.p_yes(frames[:, :1], [asked[:2]] * 2).shape == (2, 2)
    assert len(judge.caption(frames, [questions.SHORT.format(media="video")], 4)) == 2


def test_captions_come_back_as_the_grammar_writes_them(tokenizer):
    for scene in _scenes(30):
        ids = tokenizer(caption(scene), add_special_tokens=False).input_ids
        assert keeps(parse(tokenizer.decode(ids, skip_special_tokens=True)), scene)


def test_a_track_says_where_a_figure_is_and_how_it_has_moved():
    scene = parse("a small red circle moving right on a white background")
    shown = evenly_spaced(render([scene], [5]), SHOWN)[0]
    x, _, radius, to_the_right, down, grown = track_of(as_rendered(scene), shown)[:, 0].T
    assert np.all(np.diff(x) > 0.03)
    assert np.allclose(radius, np.log(RADII["small"] / 6), atol=0.1)
    assert np.allclose(to_the_right, 2 * (x - x[0]), atol=1e-5)
    assert np.abs(down).max() < 0.1 > np.abs(grown).max()
    assert np.isnan(track_of(as_rendered(scene), shown)[:, 1]).all()
    cut = parse("a red cross growing on a grey background, then a small white square moving up on a blue background")
    grown, down = track_of(as_rendered(cut), evenly_spaced(render([cut], [6]), SHOWN)[0])[:, 0, [5, 4]].T
    assert grown[0] == down[4] == 0  # each shot starts anew
    assert grown[3] > 0.3
    assert down[7] < -0.3


def test_a_few_steps_lower_the_loss(tokenizer):
    torch.manual_seed(0)
    model = build_model(tokenizer)
    data = {name: torch.as_tensor(value) for name, value in judge_lesson(tokenizer, stream(9, 0), 3, None).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(4):
        terms = judge_losses(model, data)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0]


def test_the_processor_gives_the_pixels_that_training_shows(tokenizer):
    frames = render(_scenes(1), [3])[0, :2]
    made = build_processor(tokenizer)(text=["<image><image>"], images=[list(frames)], return_tensors="pt")
    assert torch.allclose(made["pixel_values"][0], to_pixel_values(frames), atol=1e-5)


def test_the_marks_of_an_exam_are_what_they_are_called():
    right = np.asarray([True, False, True, False])
    assert auroc(np.asarray([0.9, 0.1, 0.8, 0.3]), right) == 1
    assert auroc(np.asarray([0.5, 0.5, 0.5, 0.5]), right) == 0.5
    assert ece(np.asarray([1.0, 0.0, 1.0, 0.0]), right) == 0
    assert ece(np.asarray([0.95, 0.95, 0.95, 0.95]), right) == pytest.approx(0.45)
