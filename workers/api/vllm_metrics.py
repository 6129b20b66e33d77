"""The metrics that vLLM has, too, with the same meaning.

Their names here are vLLM's without its prefix: what was made for vLLM's metrics reads these with another
prefix, or by an option as they are.
"""

VLLM_PREFIX = "vllm:"
VLLM_NAMES = frozenset((
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
    "prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits",
    "prompt_tokens", "generation_tokens", "request_success", "iteration_tokens_total",
    "request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens",
    "request_params_n", "request_params_max_tokens",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds",
    "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
))  # fmt: skip
