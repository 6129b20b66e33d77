"""A thin HTTP server before OpenVINO GenAI's continuous batching, for measurements only.

    PYTHON openvino_server.py MODEL --port 8000 --threads 2 --max-num-seqs 8 --num-tokens 16384

PYTHON has openvino-genai and Pillow; nothing of ours is imported. It answers GET /health and streams POST
/v1/chat/completions of one user's turn, with data URLs as pictures. The end of sequence is always ignored.
One thread steps the pipeline and hands tokens to the threads of the connections.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import itertools
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

BLOCK_SIZE = 32  # tokens, of OpenVINO's KV cache on a CPU


class Waiting(NamedTuple):
    handle: Any
    tokens: queue.SimpleQueue[list[int]]  # an empty list is the end


class Stepper:
    """Owns the pipeline; `submit` is called by the connections' threads."""

    def __init__(self, folder: str, options: argparse.Namespace) -> None:
        self._genai = importlib.import_module("openvino_genai")
        self._tensor = importlib.import_module("openvino").Tensor
        scheduling = self._genai.SchedulerConfig()
        scheduling.num_kv_blocks = options.num_tokens // BLOCK_SIZE
        scheduling.max_num_seqs = options.max_num_seqs
        scheduling.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": options.precision,
            "KV_CACHE_PRECISION": options.precision,
            "INFERENCE_NUM_THREADS": options.threads,
        }
        self._pipeline = self._genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
        self.tokenizer = self._pipeline.get_tokenizer()
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._open: list[Waiting] = []
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, text: str, pictures: list[np.ndarray[Any, Any]], num_output: int) -> Waiting:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_output, True, False
        images = [self._tensor(picture[None]) for picture in pictures]
        number = next(self._numbers)
        if images:
            handle = self._pipeline.add_request(number, text, images, config)
        else:
            handle = self._pipeline.add_request(number, text, config)
        waiting = Waiting(handle, queue.SimpleQueue())
        with self._lock:
            self._open.append(waiting)
            self._lock.notify()
        return waiting

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._open)
                waiting = list(self._open)
            self._pipeline.step()
            for one in waiting:
                self._hand_out(one)

    def _hand_out(self, one: Waiting) -> None:
        is_over = False
        while one.handle.can_read():
            for output in one.handle.read().values():
                one.tokens.put(list(output.generated_ids))
                is_over |= output.finish_reason != self._genai.GenerationFinishReason.NONE
        if is_over:
            one.tokens.put([])
            with self._lock:
                self._open.remove(one)


def picture_of(url: str) -> np.ndarray[Any, Any]:
    data = base64.b64decode(url.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        pictures = [picture_of(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        stepper = self.server.stepper
        waiting = stepper.submit(text, pictures, body["max_tokens"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        num_tokens = 0
        while tokens := waiting.tokens.get():
            num_tokens += len(tokens)
            self._send({"choices": [{"index": 0, "delta": {"content": stepper.tokenizer.decode(tokens)}}]})
        num_prompt = waiting.handle.get_perf_metrics().get_num_input_tokens()
        self._send({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _send(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, stepper: Stepper) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.stepper = stepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder that optimum-cli has made")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--num-tokens", type=int, required=True, help="of the KV cache")
    parser.add_argument("--precision", default="bf16", help="of products and of the KV cache")
    options = parser.parse_args()
    HttpServer(options.port, Stepper(options.model, options)).serve_forever()


if __name__ == "__main__":
    main()
