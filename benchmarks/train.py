"""Fine-tuning: tokens a second of the Trainer's path against a plain loop over the same network; memory it takes.

    python benchmarks/train.py                # the demo model, all weights
    python benchmarks/train.py --mid          # also 1.1 billion parameters, LoRA

Both contestants train the same float32 network on the same random rows with AdamW, clipped gradients and a cosine; the
plain loop is what one would write without transformers. Each is a process of its own, built once. Expected: the Trainer
loses at most 5 %; the exit status is 1 where it loses more. Peak memory is RssAnon above what the process had with the
network loaded, over three steps of long rows, in a new process each.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, options, ratios
from load_memory import MB, Watch
from processes import Child

ALLOWED = 0.95
WARM = 2  # steps before time is taken
SHAPES = {"demo": (16, 64, 20), "mid": (1, 128, 4)}  # rows, tokens a row, steps a round
LONG = {"demo": (16, 512), "mid": (1, 1024)}


class Network:
    """A network with what is trained of it, and rows to train on."""

    def __init__(self, folder: Path, lora: bool, threads: int) -> None:
        import torch

        from hunyuan_vllm.adapter import ATTENTION
        from hunyuan_vllm.train.collate import pad_batch
        from hunyuan_vllm.train.model import add_lora, load_model

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model = load_model(folder, torch.float32)
        self.model.config.use_cache = False
        self.vocabulary = self.model.config.vocab_size
        if lora:
            self.model = add_lora(self.model, rank=16, alpha=32, dropout=0.0, targets=ATTENTION, base=folder)
        self.collator = functools.partial(pad_batch, pad=0)

    def rows(self, tokens: int) -> Any:
        from hunyuan_vllm.train.collate import DummyDataset

        return DummyDataset(self.vocabulary, tokens, 4096)


class Plain(Network):
    """The loop one would write."""

    def rate(self, rows: int, tokens: int, steps: int) -> float:
        """Tokens a second."""
        import torch

        loader = torch.utils.data.DataLoader(self.rows(tokens), rows, shuffle=True, collate_fn=self.collator)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(step / steps))
        self.model.train()
        begun = 0.0
        for step, batch in zip(range(WARM + steps), loader, strict=False):
            if step == WARM:
                begun = time.perf_counter()
            batch.pop("attention_mask")  # rows are full
            loss = self.model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()
        return rows * tokens * steps / (time.perf_counter() - begun)


class Trainer(Network):
    """What `hunyuan_vllm.train` runs, with its log line at each fifth step."""

    def rate(self, rows: int, tokens: int, steps: int) -> float:
        """Tokens a second."""
        clock = _clock()
        self._train(rows, tokens, WARM + steps, clock)
        return rows * tokens * steps / (clock.ended - clock.begun)

    def peak(self, rows: int, tokens: int, checkpointing: bool) -> int:
        """Bytes above the loaded network."""
        with Watch() as watch:
            self._train(rows, tokens, 3, None, gradient_checkpointing=checkpointing)
        return watch.peak - watch.before

    def _train(self, rows: int, tokens: int, steps: int, clock: Any, **more: Any) -> None:
        from rich.console import Console
        from transformers.trainer_callback import PrinterCallback

        from hunyuan_vllm.train.arguments import TrainingArguments
        from hunyuan_vllm.train.trainer import Display, HunYuanTrainer

        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(
                output_dir=output, per_device_train_batch_size=rows, max_steps=steps, learning_rate=1e-4,
                save_strategy="no", report_to="none", **more,
            )  # fmt: skip
            trainer = HunYuanTrainer(
                model=self.model, args=arguments, train_dataset=self.rows(tokens), data_collator=self.collator,
                callbacks=[Display(Console(stderr=True)), *([clock] if clock else [])],
                finish=lambda folder, dtype: None, around=nullcontext,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun = ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                self.begun = time.perf_counter()
            self.ended = time.perf_counter()

    return Clock()


def main() -> None:
    parser = options(__doc__, rounds=4)
    checkpoint_option(parser)
    parser.add_argument("--mid", action="store_true", help="also the benchmarks' checkpoint of 1.1 billion parameters")
    arguments = parser.parse_args()
    from hunyuan_vllm import demo

    networks = {"demo": (Path(demo.__file__).parent, False)}
    if arguments.mid:
        networks["mid"] = (mid_checkpoint(arguments.checkpoint), True)
    report = Report("train", arguments)
    environ = {"OMP_NUM_THREADS": str(arguments.threads), "DS_ACCELERATOR": "cpu"}
    worst = 1.0
    for name, (folder, lora) in networks.items():
        given = (folder, lora, arguments.threads)
        with (
            Child(f"{name} plain loop", Plain, *given, environ=environ) as plain,
            Child(f"{name} Trainer", Trainer, *given, environ=environ) as trainer,
        ):
            contestants = {"plain loop": plain.ready(), "Trainer": trainer.ready()}
            rates = interleaved(
                {
                    who: lambda child=child, shape=SHAPES[name]: child.call("rate", *shape)
                    for who, child in contestants.items()
                },
                arguments.rounds,
            )
        rows, tokens, steps = SHAPES[name]
        for who, found in rates.items():
            kept = ratios(found, rates["plain loop"])
            worst = min(worst, kept.median)
            title = (
                f"{name}, {'LoRA' if lora else 'all weights'}: {rows} rows of {tokens} tokens, {steps} steps a round"
            )
            report.add(title, path=who, tokens_per_second=Spread.of(found), to_the_plain_loop=kept)
        rows, tokens = LONG[name]
        peaks = {}
        for checkpointing in (False, True):
            with Child(f"{name} memory", Trainer, *given, environ=environ) as child:
                peaks[checkpointing] = child.ready().call("peak", rows, tokens, checkpointing)
        for checkpointing, peak in peaks.items():
            report.add(
                f"{name}: peak above the network in MB, {rows} rows of {tokens} tokens",
                gradient_checkpointing=str(checkpointing), peak=peak / MB, to_without=peak / peaks[False],
            )  # fmt: skip
    report.show()
    sys.exit(worst < ALLOWED)


if __name__ == "__main__":
    main()
