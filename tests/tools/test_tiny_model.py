"""The lessons of the embedded model: what training may show, what is the same for everybody, and tensors as
transformers has them."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from launcher.checkpoints import EMBEDDED
from tools.tiny_model import (
    assets,
    chinese_lessons,
    frames,
    lessons,
    object_lessons,
    pictures,
    progress,
    scene_lessons,
    train,
)
from tools.tiny_model.batches import LessonBatches, collate, converse
from tools.tiny_model.evaluate import messages_of
from tools.tiny_model.exams import SKILLS, Exam, exams
from tools.tiny_model.frames import FrameBatches
from tools.tiny_model.labels import COUNTED, HEADS, NUM_CLASSES
from tools.tiny_model.lessons import KINDS, make_lesson
from tools.tiny_model.names import CHINESE, COLORS, SHAPES
from tools.tiny_model.phrases import COURTESIES, PHRASES
from tools.tiny_model.samples import film, samples
from tools.tiny_model.scenes import (
    HELD_OUT_PAIRS,
    HELD_OUT_PLACES,
    Scene,
    Thing,
    draw,
    is_at_held_out_place,
    label,
    make_scene,
)
from tools.tiny_model.small_talk import HELD_OUT_UNKNOWN_QUESTIONS, OF_THINGS, UNKNOWN_QUESTIONS
from tools.tiny_model.stitch import stitch
from tools.tiny_model.teacher import (
    NEW_CONTENT,
    NEW_PHRASES,
    NEW_SCENES,
    TRAINING,
    Lesson,
    Split,
    Teacher,
    Turn,
)
from tools.tiny_model.tower import DenseHead, embed, grids, make_fast, to_patches
from tools.tiny_model.train import Learner, Trainer, is_layer_matrix

HELD_OUT_NAMES = {
    name
    for color, shape in HELD_OUT_PAIRS
    for name in (f"{color} {shape}", f"{CHINESE[color]}的{CHINESE[shape]}")
}


@pytest.mark.parametrize("count", [None, 1, 9])
def test_training_scenes_hold_out_pairs_and_places(count: int | None) -> None:
    rng = random.Random(1)
    for _ in range(300):
        for thing in make_scene(rng, count, odd=0.3).things:
            assert (thing.color, thing.shape) not in HELD_OUT_PAIRS
            assert (thing.shape, thing.cell) not in HELD_OUT_PLACES


@pytest.fixture(scope="module")
def odd() -> list[Thing]:
    rng = random.Random(1)
    return [
        thing
        for _ in range(2000)
        for thing in make_scene(rng, 5, odd=0.6).things
        if thing.paint and thing.shape
    ]


def test_no_color_without_a_name_looks_like_that_of_a_held_out_pair(odd: list[Thing]) -> None:
    plain = [(thing.shape, thing.paint) for thing in odd if thing.paint and not thing.fade]
    assert len(plain) > 1000
    for color, shape in HELD_OUT_PAIRS:
        by_name = [
            {name: math.dist(rgb, paint) for name, rgb in COLORS.items()}
            for its_shape, paint in plain
            if its_shape == shape
        ]
        assert 90 <= min(distances[color] for distances in by_name) < 130
        assert all(
            min(distances, key=distances.__getitem__) != color or distances[color] >= 130
            for distances in by_name
        )
    crosses = [paint for shape, paint in plain if shape == "cross"]
    assert any(min(COLORS, key=lambda name: math.dist(COLORS[name], paint)) == "blue" for paint in crosses), (
        "blue's surroundings lack a side"
    )


def test_a_thing_in_two_colors_does_not_look_like_a_held_out_pair(odd: list[Thing]) -> None:
    faded = [(thing.shape, thing.paint, thing.fade) for thing in odd if thing.paint and thing.fade]
    assert len(faded) > 1000
    for shape, one, other in faded:
        assert math.dist(one, other) >= 220
        mean = [sum(values) / 2 for values in zip(one, other, strict=True)]
        assert all(
            math.dist(COLORS[color], mean) >= 90 for color, its_shape in HELD_OUT_PAIRS if its_shape == shape
        )


@pytest.mark.parametrize("seed", range(6))  # soft and sharp borders
def test_a_thing_in_two_colors_has_one_at_either_side(seed: int) -> None:
    square = Thing("square", "", 0.5, 0.5, 0.3, paint=(255, 0, 0), fade=(0, 0, 255), seed=seed)
    drawn = np.asarray(draw(Scene((square,), (0, 255, 0), 3), (112, 112))).astype(int)
    inside = drawn[34:78, 34:78]
    assert inside[..., 1].max() < 10, "the ground shines through"
    edges = [inside[0].mean(0), inside[-1].mean(0), inside[:, 0].mean(0), inside[:, -1].mean(0)]
    redness = [edge[0] - edge[2] for edge in edges]
    assert max(redness) > 40
    assert min(redness) < -40
    assert redness[0] == pytest.approx(-redness[1], abs=30)
    assert redness[2] == pytest.approx(-redness[3], abs=30)
    assert (drawn[:5] == (0, 255, 0)).all(axis=-1).mean() > 0.9


def test_held_out_scenes_show_a_held_out_pair() -> None:
    rng = random.Random(1)
    assert all(
        (thing := make_scene(rng, 2, held_out=True).things[0])
        and (thing.color, thing.shape) in HELD_OUT_PAIRS
        for _ in range(50)
    )


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Every scene that is drawn, while whatever asks for the held-out part of fonts, clothes, photos or emoji
    fails."""
    seen: list[Scene] = []

    def watched(scene: Scene, size: tuple[int, int]) -> Image.Image:
        seen.append(scene)
        return draw(scene, size)

    def for_training_only(draw_it: Callable[..., object]) -> Callable[..., object]:
        def drawn(*arguments: object) -> object:
            assert arguments[-1] is False
            return draw_it(*arguments)

        return drawn

    monkeypatch.setattr(pictures, "draw", watched)
    users_of_emoji = [(module, "draw_emoji") for module in (pictures, frames, object_lessons)]
    for module, name in [(assets, "fonts"), (assets, "clothes"), (assets, "photos"), *users_of_emoji]:
        monkeypatch.setattr(module, name, for_training_only(getattr(module, name)))
    return seen


WITHOUT_SHAPES = ("number", "word", "clothes", "emoji", "chart", "photo", "talk")


def _has_nothing_held_out(scenes: Sequence[Scene]) -> bool:
    things = [thing for scene in scenes for thing in scene.things]
    return not any(
        (thing.color, thing.shape) in HELD_OUT_PAIRS or is_at_held_out_place(thing) for thing in things
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_lesson_of_training_shows_what_is_held_out(kind: str, shown: list[Scene]) -> None:
    """Whatever is drawn, also while it moves or after it has changed."""
    teacher = Teacher(random.Random(3), TRAINING)
    for _ in range(120 if kind == "video" else 25):
        make_lesson(teacher, kind)
    assert kind in WITHOUT_SHAPES or len(shown) >= 20  # some lessons in Chinese are of print
    assert _has_nothing_held_out(shown)


@pytest.mark.parametrize("kind", list(frames.KINDS))
def test_no_picture_of_the_first_stage_shows_what_is_held_out(kind: str, shown: list[Scene]) -> None:
    rng = random.Random(3)
    for _ in range(120 if kind == "clip" else 25):
        frames.draw_picture(kind, rng, (112, 112))
    assert kind not in ("scene", "crowd", "clip") or len(shown) >= 25
    assert _has_nothing_held_out(shown)


def test_what_is_held_out_would_be_seen(shown: list[Scene]) -> None:
    teacher = Teacher(random.Random(3), NEW_CONTENT)
    make_lesson(teacher, "one shape")
    assert not _has_nothing_held_out(shown)
    with pytest.raises(AssertionError):
        make_lesson(teacher, "number")


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_never_names_a_held_out_pair(kind: str) -> None:
    """Neither shown, nor asked for: what is asked for and never there would be learned as absent."""
    teacher = Teacher(random.Random(2), TRAINING)
    for _ in range(60):
        for turn in make_lesson(teacher, kind).turns:
            told = turn.text + turn.answer.replace('"color": "', "").replace('", "shape": "', " ")
            assert not any(name in told for name in HELD_OUT_NAMES), turn


def _answers(turns: Iterable[Turn | None]) -> dict[str, set[str]]:
    answers: dict[str, set[str]] = {}
    for turn in turns:
        if turn:
            answers.setdefault(turn.text, set()).add(turn.answer)
    return answers


@pytest.mark.parametrize("split", [NEW_SCENES, NEW_PHRASES])
@pytest.mark.parametrize("ask", [scene_lessons.about, chinese_lessons.about])
def test_every_question_has_one_right_answer(
    ask: Callable[[Teacher, Scene], Turn | None], split: Split
) -> None:
    """However often something is asked about a picture."""
    for seed in range(12):
        teacher = Teacher(random.Random(seed), split)
        scene = teacher.scene(1 + seed % 6)
        answers = _answers(ask(teacher, scene) for _ in range(250))
        assert len(answers) > 25
        assert not {text: found for text, found in answers.items() if len(found) > 1}


@pytest.mark.parametrize("split", [NEW_SCENES, NEW_PHRASES])
def test_every_question_without_a_picture_has_one_right_answer(split: Split) -> None:
    teacher = Teacher(random.Random(1), split)
    answers = _answers(turn for _ in range(1500) for turn in lessons.talk(teacher))
    assert len(answers) > 200
    assert not {text: found for text, found in answers.items() if len(found) > 1}


def test_the_mass_of_a_scene_is_the_number_of_its_things() -> None:
    """Of all of them, of each colour, and of each shape."""
    rng = random.Random(4)
    for count in range(10):
        scene = make_scene(rng, count, alike=0.5)
        sums = label(scene, (140, 112)).mass.sum((0, 1))
        expected = [sum(name in ("", thing.color, thing.shape) for thing in scene.things) for name in COUNTED]
        assert sums == pytest.approx(expected, abs=1e-4)


def test_what_has_no_name_is_counted_among_all_things_only() -> None:
    one = Thing("star", "", 0.25, 0.25, 0.1, (90, 120, 60))
    other = Thing("", "blue", 0.75, 0.75, 0.1)
    sums = dict(
        zip(COUNTED, label(Scene((one, other), (200, 200, 200), 1), (140, 140)).mass.sum((0, 1)), strict=True)
    )
    assert sums[""] == pytest.approx(2)
    assert all(np.isnan(sums[name]) for name in (*COLORS, *SHAPES))
    blue = label(Scene((other,), (200, 200, 200), 1), (140, 140)).mass[..., COUNTED.index("blue")]
    assert blue.sum() == pytest.approx(1)


def test_the_dense_head_learns_nothing_from_what_nobody_counts() -> None:
    torch.manual_seed(0)
    head = DenseHead(8)
    embeddings, classes = torch.randn(4, 8), torch.zeros(1, 2, 2, len(HEADS), dtype=torch.int64)
    mass = torch.full((1, 2, 2, len(COUNTED)), float("nan"))
    mass[..., 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, seen = head(embeddings, classes, mass)
    loss.backward()
    gradient = head.linear.weight.grad
    assert gradient is not None
    assert gradient[NUM_CLASSES].abs().sum() > 0
    assert gradient[NUM_CLASSES + 1 :].abs().sum() == 0
    assert seen["count"] in (0.0, 1.0)
    assert np.isnan(seen["count of"])


def test_scenes_of_things_alike_have_several_of_a_kind() -> None:
    rng = random.Random(1)
    scenes = [make_scene(rng, 8, alike=1.0) for _ in range(20)]
    assert all(
        len({thing.color for thing in scene.things}) <= 4
        and len({thing.shape for thing in scene.things}) <= 4
        for scene in scenes
    )


def _words(text: str) -> str:
    """What is left of a wording when case and marks are not told apart; @ for its fields, but for those that
    are a matter of spelling."""
    spelt = text.lower().replace("{colour}", "colour").replace("{picture}", "picture")
    return " ".join(re.sub(r"[^\w@ ]", "", re.sub(r"\{[a-z0-9]+\}", "@", spelt)).split())


def test_held_out_wordings_are_none_of_the_trained() -> None:
    """Nor one of another question, nor with a courtesy before it, as training puts there now and then."""
    questions = [*UNKNOWN_QUESTIONS, *(text for phrases in PHRASES.values() for text in phrases.trained)]
    for part, choices in OF_THINGS.items():
        questions += [
            text.replace(f"{{{part}}}", word)
            for text in questions
            if f"{{{part}}}" in text
            for word in choices
        ]
    templates = [_words(text) for text in questions]
    trained = {
        f"{courtesy}{text}"
        for text in templates
        for courtesy in ("", *(f"{word.lower()} " for word in COURTESIES))
    }
    held_out = [_words(text) for phrases in PHRASES.values() for text in phrases.held_out] + [
        _words(text) for text in HELD_OUT_UNKNOWN_QUESTIONS
    ]
    for text in held_out:
        said = re.compile(text.replace("@", "(@|[^@]+)"))  # whatever stands in a field, "the other one" too
        assert not [other for other in trained if said.fullmatch(other)], text


def test_every_skill_is_asked_and_the_same_for_everybody() -> None:
    first, second = exams(list(SKILLS), 2), exams(list(SKILLS), 2)
    assert {exam.skill for exam in first} >= set(SKILLS) - {"clothing", "emoji"}  # which need packages
    assert [messages_of(exam) for exam in first] == [messages_of(exam) for exam in second]
    assert all(exam.lesson.turns[-1].skill == exam.skill for exam in first)


def test_exams_do_not_depend_on_their_number() -> None:
    assert messages_of(exams(["shape"], 3)[0]) == messages_of(exams(["shape"], 1)[0])


@pytest.mark.parametrize("size", [(140, 140), (140, 112)])
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    image = draw(make_scene(random.Random(3), 4), size)
    processor = Qwen2VLImageProcessorPil(min_pixels=112 * 112, max_pixels=140 * 140)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.stack([np.asarray(image)] * 2))[None]
    torch.testing.assert_close(to_patches(pixels)[0], expected, atol=1e-5, rtol=1e-5)


def _make_tower(seed: int) -> Qwen2VisionTransformerPretrainedModel:
    torch.manual_seed(seed)
    config = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": 16,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config, attn_implementation="eager"))


@pytest.mark.parametrize("size", [(140, 140), (140, 112)])
def test_the_tower_is_the_same_when_it_is_made_fast(size: tuple[int, int]) -> None:
    """Embeddings and gradients of pictures of one size, as one call."""
    tower = _make_tower(0)
    pixels = torch.randint(0, 256, (3, 2, size[1], size[0], 3), dtype=torch.uint8)
    patches, found = to_patches(pixels), []
    for is_fast in (False, True):
        if is_fast:
            make_fast(tower)
        embeddings = tower(
            patches if is_fast else patches.flatten(0, 1), grid_thw=grids(pixels)
        ).pooler_output
        tower.zero_grad()
        embeddings.square().sum().backward()
        found.append(
            [
                embeddings.detach(),
                *(parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None),
            ]
        )
    assert len(found[0]) == len(found[1]) > 20
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shares_layers", [True, False])
def test_a_tower_is_stitched_to_a_decoder_of_another(shares_layers: bool) -> None:
    """It then says what the other says, as far as that is explained; where only their last matrices differed,
    all of it."""
    tower, former = _make_tower(1), _make_tower(2)
    if shares_layers:
        last = {name: value for name, value in former.state_dict().items() if name.startswith("merger.mlp.2")}
        former.load_state_dict({**tower.state_dict(), **last})
    make_fast(tower)
    make_fast(former)
    pictures = [batch.pixels for batch in itertools.islice(FrameBatches(16, 5, 0), 20)]
    explained = stitch(tower, former, pictures)
    with torch.no_grad():
        said, expected = (
            torch.cat([embed(one, pixels).flatten(0, -2) for pixels in pictures[9::10]])
            for one in (tower, former)
        )
    unexplained = (said - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    assert explained == pytest.approx(1 - unexplained.item(), abs=1e-3)
    assert (explained > 0.99) == shares_layers


def test_muon_has_the_matrices_of_layers_only() -> None:
    names = (
        "blocks.0.mlp.fc1.weight",
        "layers.0.self_attn.q_proj.weight",
        "merger.mlp.0.weight",
        "embed_tokens.weight",
        "linear.weight",
    )
    assert [is_layer_matrix(name, nn.Parameter(torch.zeros(2, 2))) for name in names] == [
        True,
        True,
        False,
        False,
        False,
    ]


def _lesson(kind: str) -> Lesson:
    return make_lesson(Teacher(random.Random(5), NEW_SCENES), kind)


@pytest.mark.parametrize("kind", ["shapes", "three pictures", "video", "next picture", "talk"])
def test_conversations_are_those_of_the_chat_template(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED / "model")
    lesson = _lesson(kind)
    messages = messages_of(Exam("", "", lesson))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for picture, placeholder in (
        (p, "<|video_pad|>" if p.is_video else "<|image_pad|>")
        for turn in lesson.turns
        for p in turn.pictures
    ):
        width, height = picture.frames[0].size
        text = text.replace(
            placeholder, "<|pad|>" * (len(picture.labels) * (width // 28) * (height // 28)), 1
        )
    talk = converse(lesson, tokenizer)
    learned = [token for token in talk.targets if token >= 0]
    shown = (
        tokenizer.decode(talk.token_ids)
        .replace("<|image_pad|>", "<|pad|>")
        .replace("<|video_pad|>", "<|pad|>")
    )
    assert shown == f"{text}{lesson.turns[-1].answer}<|im_end|>\n"
    assert tokenizer.decode(learned) == "".join(f"{turn.answer}<|im_end|>" for turn in lesson.turns)


def test_a_batch_holds_its_pictures_in_the_order_of_their_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED / "model")
    teacher = Teacher(random.Random(6), NEW_CONTENT, (140, 112))
    batch = collate(
        [
            converse(make_lesson(teacher, kind), tokenizer)
            for kind in ("two pictures", "video", "talk", "blank")
        ],
        (140, 112),
    )
    num_placeholders = sum(
        int((batch.token_ids == tokenizer.convert_tokens_to_ids(token)).sum())
        for token in ("<|image_pad|>", "<|video_pad|>")
    )
    assert num_placeholders == len(batch.pixels) * 20 == batch.mass[..., 0].numel()
    assert int(batch.image_grids[:, 0].sum() + batch.video_grids[:, 0].sum()) == len(batch.pixels)


def test_batches_go_on_anywhere() -> None:
    whole, rest = iter(FrameBatches(4, 9, 0)), iter(FrameBatches(4, 9, 1))
    next(whole)
    assert torch.equal(next(whole).pixels, next(rest).pixels)


def test_training_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    def trainer(model: nn.Module) -> Trainer:
        return Trainer("stage", tmp_path, {"model": model}, {"model": 0.01}, 6, seed=1)

    def learn(training: Trainer, model: nn.Module, count: int) -> None:
        for _ in range(count):
            training.learn((model(torch.ones(1, 8)) - 1).square().mean(), training.step)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    learn(trainer(model), model, 6)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    stopped = trainer(model)
    learn(stopped, model, 4)
    stopped.save()
    model.load_state_dict(start)
    resumed = trainer(model)
    assert resumed.resume(torch.device("cpu"))
    assert resumed.step == 4
    learn(resumed, model, 2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_log_goes_on_where_the_state_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are learned again are logged once, and a stage's minutes are all that it lasted."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    path = tmp_path / "log.jsonl"
    other, log = progress.Log(path, "other"), progress.Log(path, "stage")
    other.write(75, 75, loss=3.0)
    for step in (25, 50, 75):
        clock[0] += 60.0
        log.write(step, 100, loss=1.0)
    with path.open("a") as file:
        file.write('{"stage": "sta')  # when it was killed
    resumed = progress.Log(path, "stage")
    resumed.go_on(60)
    clock[0] += 30.0
    resumed.write(75, 100, loss=0.5)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["stage"], entry["step"], entry["minutes"]) for entry in entries] == [
        ("other", 75, 0.0), ("stage", 25, 1.0), ("stage", 50, 2.0), ("stage", 75, 2.5),
    ]  # fmt: skip


def test_the_samples_are_those_that_their_tool_draws() -> None:
    """As far as what they show is here."""
    drawn = samples()
    assert (
        {"red-star", "three-shapes", "blank", "chart"}
        <= set(drawn)
        <= {path.stem for path in (EMBEDDED / "samples").iterdir()}
    )
    with av.open(str(EMBEDDED / "samples" / "moving-star.mp4")) as shown:
        frames = [frame.to_ndarray(format="rgb24") for frame in shown.decode(video=0)]
    assert len(frames) == len(film())
    for frame, image in zip(frames, film(), strict=True):
        assert np.abs(frame.astype(int) - np.asarray(image).astype(int)).mean() < 4, "but for its coding"
    for name, image in drawn.items():
        with Image.open(EMBEDDED / "samples" / f"{name}.png") as shipped:
            np.testing.assert_array_equal(np.asarray(shipped.convert("RGB")), np.asarray(image), err_msg=name)


def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    Trainer("stage", tmp_path, {"model": model}, {"model": 0.01}, 6, seed=1).save()
    with pytest.raises(ValueError, match="another --out"):
        Trainer("stage", tmp_path, {"model": model}, {"model": 0.01}, 9, seed=1).resume(torch.device("cpu"))


def test_a_run_that_begins_with_weights_has_to_fit_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path / "run"), "--start-from", str(EMBEDDED / "model"), "--vision-steps", "0"]
    monkeypatch.setattr("sys.argv", ["train", *options])
    with pytest.raises(SystemExit):
        train.main()
    assert "--start-from needs --vision-steps 200 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_that_several_processes_draw_come_in_the_same_order() -> None:
    alone, together = (
        iter(FrameBatches(4, 9, 0)),
        iter(DataLoader(FrameBatches(4, 9, 0), batch_size=None, num_workers=2)),
    )
    for _ in range(4):
        assert torch.equal(next(alone).pixels, next(together).pixels)


def test_lessons_go_on_at_any_pool() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED / "model")
    batches = itertools.dropwhile(lambda found: found[0] < 1, LessonBatches(tokenizer, 8000, 4))
    assert torch.equal(
        next(batches)[1].token_ids, next(iter(LessonBatches(tokenizer, 8000, 4, first_pool=1)))[1].token_ids
    )


def test_a_tower_that_learns_from_lessons_sees_pictures_of_the_first_stage_too() -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        EMBEDDED / "model", dtype=torch.float32, attn_implementation="eager"
    )
    make_fast(model.model.visual)
    learner = Learner(model, DenseHead(model.config.text_config.hidden_size))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED / "model")
    teacher = Teacher(random.Random(1), TRAINING, (112, 112))

    learner.loss(collate([converse(make_lesson(teacher, "one shape"), tokenizer)], (112, 112)), None)[
        0
    ].backward()
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())
    without_picture = collate([converse(make_lesson(teacher, "talk"), tokenizer)], (112, 112))
    # whatever the tower learns is from those beside
    loss, values = learner.loss(without_picture, next(iter(FrameBatches(2, 5, 0))))
    loss.backward()
    assert values["beside_loss"] > 0
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() > 0
        for parameter in model.model.visual.parameters()
    )


def test_things_alike_may_hold_a_new_pair() -> None:
    rng = random.Random(1)
    scenes = [make_scene(rng, 6, held_out=True, alike=1.0) for _ in range(50)]
    assert all((scene.things[0].color, scene.things[0].shape) in HELD_OUT_PAIRS for scene in scenes)


def test_a_thing_looks_the_same_beside_others() -> None:
    thing, other = Thing("star", "red", 0.25, 0.5, 0.1, seed=5), Thing("ring", "blue", 0.75, 0.5, 0.1, seed=6)
    alone, both = (
        np.asarray(draw(Scene(things, (200, 200, 200), 3), (112, 112)))
        for things in ((thing,), (other, thing))
    )
    assert (alone[:, :56] == both[:, :56]).all()
    assert (alone[:, 56:] != both[:, 56:]).any()


def test_nothing_is_where_nothing_reaches() -> None:
    """The answer "Nothing." is for a ninth of the picture in which there is nothing, not one in which no
    centre is."""
    large = Thing("circle", "red", 0.5, 0.5, 0.35)
    assert large.covers("top") > 0.1
    assert Thing("circle", "red", 0.5, 0.5, 0.1).covers("top") == 0
    teacher = Teacher(random.Random(2), NEW_SCENES)
    assert all(
        turn is None or turn.answer != "Nothing."
        for turn in (scene_lessons._at(teacher, Scene((large,), (200, 200, 200), 1)) for _ in range(200))
    )


def test_the_plot_shows_each_stage(tmp_path: Path) -> None:
    for stage in ("vision", "joint"):
        log = progress.Log(tmp_path / "log.jsonl", stage)
        for step in range(3):
            log.write(step, 3, loss=3.0 - step)
    progress.plot(tmp_path / "log.jsonl", tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    for panel in (0, image.width // 2):
        colors = image.crop((panel, 0, panel + image.width // 2, image.height)).getcolors(1 << 20)
        assert colors is not None
        assert any(color == (36, 76, 212) for _, color in colors)
