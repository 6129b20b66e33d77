from __future__ import annotations

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.packing import unpack_int32
from workers.preprocess.prompt import PromptBuilder


def test_a_word_is_banned_at_the_beginning_and_behind_a_space() -> None:
    info = read_model_info(EMBEDDED / "model")
    builder = PromptBuilder(info.folder, info.image_token_id, info.video_token_id)
    sequences = builder.token_sequences(["red", " star", "red"])
    texts = [builder._tokenizer.decode(unpack_int32(one).tolist()) for one in sequences]
    assert texts == ["red", " red", "star", " star"]
