"""What benchmarks/decode.py compares the engine with: the reference model, and mlx-lm in another interpreter."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import note

PEER = Path(__file__).with_name("mlx_peer.py")


class Reference:
    """The plain PyTorch model with its own cache, in bfloat16, to be built in a `Child`."""

    def __init__(self, model: Path) -> None:
        import torch

        from hunyuan_vllm.reference import HunYuanForCausalLM

        self._model = HunYuanForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the file, weights are read more slowly

    def steps(self, prompts: Sequence[list[int]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Seconds of each step, the first of which reads the prompts; and the tokens, greedy."""
        import torch
        from transformers import DynamicCache

        cache, given = DynamicCache(), torch.tensor(prompts)
        seconds, tokens = [], []
        last = time.perf_counter()
        with torch.inference_mode():
            for _ in range(new_tokens):
                given = self._model(given, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
                tokens.append(given)
                now = time.perf_counter()
                seconds.append(now - last)
                last = now
        return seconds, torch.cat(tokens, dim=1).tolist()

    def distinct_experts(self, sequences: list[list[int]], prompt_tokens: int) -> float:
        """How many experts a layer reads in a step that decodes these sequences together, on average."""
        import torch

        with torch.inference_mode():
            router_logits = self._model(torch.tensor(sequences), logits_to_keep=1).router_logits
        counts: list[int] = []
        for layer, logits in enumerate(router_logits):
            chosen = logits.view(len(sequences), -1, logits.shape[-1]).topk(self._model.config.topk_at(layer)).indices
            # The last token was never an input.
            counts += [step.unique().numel() for step in chosen[:, prompt_tokens:-1].unbind(1)]
        return statistics.fmean(counts)


class MlxPeer:
    """mlx-lm on the CPU, one sequence in float32."""

    def __init__(self, python: Path, model: Path) -> None:
        if not python.is_file():
            raise SystemExit(f"--mlx-python {python}: there is no such interpreter")
        command = [str(python), str(PEER), str(model)]
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def __enter__(self) -> MlxPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ready(self) -> str:
        """Wait until it has loaded the model; returns mlx-lm's version."""
        version = str(self._receive()["version"])
        note(f"mlx-lm {version} is ready")
        return version

    def steps(self, prompts: Sequence[list[int]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
        """As `Reference.steps`, of one prompt."""
        assert self._process.stdin is not None
        (prompt,) = prompts
        print(json.dumps({"prompt": prompt, "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        answer = self._receive()
        return answer["seconds"], [answer["tokens"]]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("mlx-lm ended: its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer
