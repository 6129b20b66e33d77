"""What the launcher prints once all workers serve: the address, and a request to try."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from pathlib import Path

from launcher.checkpoints import Model
from pipeline.config import Config
from pipeline.config.api import ApiConfig

logger = logging.getLogger(__name__)
SERVING = re.compile(r"Serving at (\S+)/v1")  # how the line with the address begins


def announce(config: Config, model: Model, run_dir: Path, port: int) -> None:
    """`port` is the endpoint's."""
    url = f"{'https' if config.api.ssl_certfile else 'http'}://{shown_host(config.api.host)}:{port}"
    logger.info("serving %s at %s (run directory %s)", model.names[0], url, run_dir)
    if config.has_gateway:
        host = shown_host(config.direct.direct_host)
        logger.info("serving clients with keys at tcp://%s:%s", host, config.direct.direct_port)
    example = example_request(url, model, key=_shown_key(config.api))
    sys.stdout.write(f"\nServing at {url}/v1 — try:\n\n{example}\n\n")
    if not config.api.disable_page:
        sys.stdout.write(f"or open {url}/ in a browser.\n\n")
    sys.stdout.flush()


def _shown_key(config: ApiConfig) -> str:
    """The placeholder for a key in the example; empty where no key is needed."""
    if not config.keys:
        return ""
    return "$VLM_API_KEY" if config.key_is_in_environment else "YOUR_KEY"


def shown_host(host: str) -> str:
    """The host as written in a URL; the loopback address for a wildcard."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def example_request(url: str, model: Model, key: str) -> str:
    """A curl command; with a picture where the model comes with one. `key` is a placeholder."""
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    head = f"curl -s {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d "
    if model.sample is None:
        return head + """'{"messages": [{"role": "user", "content": "Say hello."}]}'"""
    picture = f"""data:image/png;base64,'"$(base64 -w0 {shlex.quote(str(model.sample))})"'"""
    parts = (
        f"""[{{"type": "image_url", "image_url": {{"url": "{picture}"}}}}, """
        """{"type": "text", "text": "What is in this picture?"}]"""
    )
    return f"""{head}'{{"messages": [{{"role": "user", "content": {parts}}}]}}'"""
