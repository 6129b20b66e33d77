"""The reference and its checkpoints: each family's are fit to show an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.families import read_model_info
from tests.chats import ChatTurns
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.family_chats import FAMILY_CHATS
from tests.pictures import scene
from tests.positions import rope_index
from tests.reference import Reference

References = Callable[[str], Reference]
PICTURE_CHATS = [name for name in FAMILY_CHATS if not any(word in name for word in ("video", "frames"))]
VIDEO_CHATS = [name for name in FAMILY_CHATS if name not in PICTURE_CHATS]
OLDER = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    made: dict[str, Reference] = {}

    def of(family: str) -> Reference:
        if family not in made:
            made[family] = Reference(make_checkpoint(tmp_path_factory.mktemp(family), family))
        return made[family]

    return of


def rows_of_the_rule(inputs: dict[str, Any], is_by_frame: bool) -> tuple[torch.Tensor, int]:
    """By `tests/positions.py`; each frame of a video may be a run by itself."""
    pictures, videos = (
        inputs[name].tolist() if name in inputs else [] for name in ("image_grid_thw", "video_grid_thw")
    )
    if is_by_frame:
        videos = [(1, height, width) for time, height, width in videos for _ in range(time)]
    types = inputs["mm_token_type_ids"][0].tolist()
    return rope_index(types, pictures, videos, 2, [1.0] * len(videos))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_of_positions_is_that_of_transformers(family: str, references: References) -> None:
    """For pictures, and for Qwen3-VL's videos: there all releases agree."""
    reference = references(family)
    for name in FAMILY_CHATS if family not in OLDER else PICTURE_CHATS:
        inputs = reference.inputs(FAMILY_CHATS[name])
        media = {key: inputs[key] for key in inputs if key.endswith(("thw", "type_ids"))}
        rows, deltas = reference.model.model.get_rope_index(inputs["input_ids"], **media)
        expected, delta = rows_of_the_rule(inputs, is_by_frame=True)
        assert torch.equal(rows[:, 0], expected), name
        assert int(deltas) == delta, name


@pytest.mark.parametrize("family", OLDER)
def test_text_goes_on_after_a_long_videos_time(family: str, references: References) -> None:
    reference = references(family)
    inputs = reference.inputs(FAMILY_CHATS["a long video"])
    rows, _ = reference.positions(inputs)
    is_video = inputs["mm_token_type_ids"][0] == 2
    behind = int(is_video.nonzero().max()) + 1
    assert is_video.any()
    assert rows[0, 0, behind] == rows[:, 0, :behind].max() + 1
    extra = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if family == "qwen2_5_vl" else {}
    theirs, _ = reference.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"], **extra
    )
    assert torch.equal(theirs[:, 0, :behind], rows[:, 0, :behind])
    assert theirs[0, 0, behind] < rows[0, 0, behind], "the chat shows where transformers' rule differs"


@pytest.mark.parametrize("name", ["a long video", "pictures and videos mixed", "one picture"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_from_the_positions(family: str, name: str, references: References) -> None:
    """Each token is that of the whole text, computed without a cache at explicit positions."""
    reference = references(family)
    answer = reference.answer(FAMILY_CHATS[name], 4)
    inputs = reference.inputs(FAMILY_CHATS[name])
    rows, deltas = reference.positions(inputs)
    num_prompt = len(answer.prompt_token_ids)
    later = torch.arange(num_prompt, num_prompt + 4).expand(3, 1, -1) + deltas
    ids = torch.tensor([answer.prompt_token_ids + answer.token_ids])
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image", "video"))}
    with torch.inference_mode():
        logits = reference.model(
            input_ids=ids, position_ids=torch.cat([rows, later], dim=-1), use_cache=False, **pixels
        ).logits
    assert logits[0, num_prompt - 1 : -1].argmax(-1).tolist() == answer.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_all_chats_have_lively_answers(family: str, references: References) -> None:
    reference = references(family)
    read_model_info(reference.folder)
    answers = {name: reference.answer(chat, 16) for name, chat in FAMILY_CHATS.items()}
    for name, answer in answers.items():
        assert len(answer.token_ids) == 16, name
        assert len(set(answer.token_ids)) >= 6, name
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == len(answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_depends_on_the_picture(family: str, references: References) -> None:
    chats: list[ChatTurns] = [[("user", [scene(seed), "What is in this picture?"])] for seed in range(4)]
    answers = {tuple(references(family).answer(chat, 8).token_ids) for chat in chats}
    assert len(answers) == len(chats)


def without_windows(model: Any) -> None:
    model.model.visual.fullatt_block_indexes = [0, 1, 2, 3]


def with_windows_everywhere(model: Any) -> None:
    model.model.visual.fullatt_block_indexes = []


def spoilt(part: str, value: float) -> Callable[[Any], None]:
    """All parameters with this in their names have one value."""

    def change(model: Any) -> None:
        chosen = [parameter for name, parameter in model.named_parameters() if part in name]
        assert chosen
        with torch.no_grad():
            for parameter in chosen:
                parameter.fill_(value)

    return change


OF_QWEN3 = {
    "no positions in the tower": spoilt("pos_embed", 0),
    "no deepstack": spoilt("deepstack_merger_list", 0),
    "no biases of deepstack": spoilt("deepstack_merger_list.0.linear_fc1.bias", 0),
    "no weights in norms of queries": spoilt("q_norm", 1),
    "no weights in norms of keys": spoilt("k_norm", 1),
    "no bias of patches": spoilt("patch_embed.proj.bias", 0),
}
OF_QWEN3_5 = {
    "no positions in the tower": spoilt("pos_embed", 0),
    "weights in norms of queries are not stored minus one": spoilt("q_norm", 0),
    "heads of linear attention fade alike": spoilt("A_log", 0),
    "no biases of fading": spoilt("dt_bias", 0),
    "all tokens fade alike": spoilt("in_proj_a", 0),
    "all tokens are written alike": spoilt("in_proj_b", 0),
    "no weights in norms of linear attention": spoilt("linear_attn.norm", 1),
}
ERRORS: dict[str, dict[str, Callable[[Any], None]]] = {
    "qwen2_vl": {"no biases of keys": spoilt("k_proj.bias", 0)},
    "qwen2_5_vl": {
        "no windows": without_windows,
        "windows everywhere": with_windows_everywhere,
        "no biases of MLPs in the tower": spoilt("gate_proj.bias", 0),
    },
    "qwen3_vl": OF_QWEN3,
    "qwen3_vl_moe": {**OF_QWEN3, "all experts alike to the router": spoilt("mlp.gate.weight", 0)},
    "qwen3_5": OF_QWEN3_5,
    "qwen3_5_moe": {
        "no gates of shared experts": spoilt("shared_expert_gate", 0),
        "no shared experts": spoilt("shared_expert.down_proj", 0),
    },
}


@pytest.mark.parametrize(("family", "error"), [(name, error) for name in ERRORS for error in ERRORS[name]])
def test_an_answer_shows_an_error(family: str, error: str, references: References) -> None:
    reference = references(family)
    chat = FAMILY_CHATS["sides no multiple of the window"]
    right = reference.answer(chat, 24).token_ids
    wrong = Reference(reference.folder)
    ERRORS[family][error](wrong.model)
    assert wrong.answer(chat, 24).token_ids != right


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_a_video_is_written_frame_by_frame_inside_the_templates_marks(
    family: str, references: References
) -> None:
    reference = references(family)

    def written(name: str) -> str:
        text: str = reference.tokenizer.decode(reference.inputs(FAMILY_CHATS[name])["input_ids"][0])
        pads = "<|video_pad|>"
        while pads * 2 in text:
            text = text.replace(pads * 2, pads)
        return text

    # The last frame stands for one that the last pair lacks; nobody says the rate of the third: 24 a second.
    for name, times in {
        "frames with times": ("0.2", "2.4", "9.2"),
        "frames at a slow rate": ("1.0", "5.0"),
        "frames without times, an odd number": ("0.0", "0.1"),
    }.items():
        frames = [f"<{time} seconds><|vision_start|><|video_pad|><|vision_end|>" for time in times]
        assert f"<|vision_start|>{''.join(frames)}<|vision_end|>" in written(name)


def test_seconds_between_frames_are_those_of_the_source(references: References) -> None:
    """Of Qwen2.5-VL: 6 frames of a video that lasts 1.5 seconds, and lists of frames."""

    def seconds(name: str) -> list[float]:
        found: list[float] = (
            references("qwen2_5_vl").inputs(FAMILY_CHATS[name])["second_per_grid_ts"].tolist()
        )
        return found

    assert seconds("a video") == pytest.approx([2 * 1.5 / 6])
    assert seconds("frames at a slow rate") == pytest.approx([4.0])
    assert seconds("frames with times") == pytest.approx([2 * 9.25 / 4])
    assert seconds("frames without times, an odd number") == pytest.approx([2 / 24])
