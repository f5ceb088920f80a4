"""An engine core that generates nothing: it speaks vLLM's protocol between the front end and
the core (ZMQ and msgpack, vllm 0.32 `v1/engine/core_client.py`) and emits prepared tokens at a
set rate. What it cannot show is the model; what it shows is what the front end costs when the
model is fast.

Owns nothing of the project: it is the peer of the engine's real front end.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import zmq
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

IDENTITY = (0).to_bytes(2, "little")


@dataclass
class _Running:
    params: SamplingParams
    sent: int = 0


class FakeCore:
    """Emits one of `token_ids` per request and step, `tokens_per_s` over all requests together."""

    def __init__(self, input_address: str, output_address: str, tokens_per_s: float) -> None:
        context = zmq.Context()
        self._input = context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, IDENTITY)
        self._input.connect(input_address)
        self._output = context.socket(zmq.PUSH)
        self._output.connect(output_address)
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._generic = MsgpackDecoder()
        self._tokens_per_s = tokens_per_s
        self._running: dict[str, _Running] = {}

    def serve(self, token_ids: list[int]) -> None:
        """Serve until the process is ended."""
        self._input.send(b"")  # ready
        due = time.monotonic()
        while True:
            wait_ms = None if not self._running else max(0, int(1000 * (due - time.monotonic())))
            while self._input.poll(wait_ms):
                self._receive(self._input.recv_multipart())
                wait_ms = 0
            now = time.monotonic()
            if self._running and now >= due:
                due = max(due, now - 0.05) + len(self._running) / self._tokens_per_s
                self._step(token_ids)

    def _receive(self, message: list[bytes]) -> None:
        kind, *frames = message
        match EngineCoreRequestType(kind):
            case EngineCoreRequestType.ADD:
                request = self._requests.decode(frames)
                assert request.sampling_params is not None
                self._running[request.request_id] = _Running(request.sampling_params)
            case EngineCoreRequestType.ABORT:
                for request_id in self._generic.decode(frames):
                    self._running.pop(request_id, None)
            case EngineCoreRequestType.UTILITY:
                _, call_id, method, _ = self._generic.decode(frames)
                result = ("generate",) if method == "get_supported_tasks" else None
                output = UtilityOutput(call_id=call_id, result=UtilityResult(result))
                self._send(EngineCoreOutputs(utility_output=output))

    def _step(self, token_ids: list[int]) -> None:
        outputs = []
        for request_id, request in list(self._running.items()):
            request.sent += 1
            finished = request.sent >= (request.params.max_tokens or 1)
            outputs.append(
                EngineCoreOutput(
                    request_id=request_id,
                    new_token_ids=[token_ids[request.sent % len(token_ids)]],
                    finish_reason=FinishReason.LENGTH if finished else None,
                )
            )
            if finished:
                del self._running[request_id]
        self._send(EngineCoreOutputs(outputs=outputs))

    def _send(self, outputs: EngineCoreOutputs) -> None:
        buffers: Any = self._encoder.encode(outputs)
        self._output.send_multipart(buffers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input_address")
    parser.add_argument("output_address")
    parser.add_argument("tokens_per_s", type=float)
    parser.add_argument("token_ids", type=int, nargs="+")
    args = parser.parse_args()
    FakeCore(args.input_address, args.output_address, args.tokens_per_s).serve(args.token_ids)


if __name__ == "__main__":
    main()
