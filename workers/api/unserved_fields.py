"""Fields of other servers that are not served here, each with the values that change nothing.

Any other value would change the answer: it is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.wire.errors import RequestError, shown

Neutral = Mapping[str, Sequence[object]]
NEUTRAL: Neutral = {
    # OpenAI
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "suffix": (),
    "moderation": (),
    # vLLM
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "prompt_embeds": (),
    "logits_processors": (),
    "kv_transfer_params": (),
    "repetition_detection": (),
    "chat_template": (),
    "documents": (),
    "echo": (False,),  # of a chat; a completion's is served
    "return_tokens_as_token_ids": (False,),
    "logprob_token_ids": (),
    "truncation_side": ("left",),
    "guided_whitespace_pattern": (),
    # SGLang
    "custom_logit_processor": (),
    "custom_params": (),
    "lora_path": (),
    "session_params": (),
    "stop_regex": (),
    "regex": (),
    "ebnf": (),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "input_ids": (),
    # llama.cpp
    "grammar": (),
    "json_schema": (),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "samplers": (),
    "grammar_triggers": (),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    # Anthropic
    "mcp_servers": (),
    "container": (),
}


def refuse_unserved(unknown: Mapping[str, Any], neutral: Neutral = NEUTRAL) -> list[str]:
    """The names of fields that are ignored: nobody here knows them. Raises RequestError for a field that is
    known, not served, and set to more than a neutral value."""
    ignored = []
    for name, value in unknown.items():
        if name not in neutral:
            ignored.append(name)
        elif value not in neutral[name]:
            raise RequestError(f"{name} is not served by this server, got {shown(value)}", field=name)
    return ignored
