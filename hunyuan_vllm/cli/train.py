"""`hunyuan-vllm train`: fine-tune a checkpoint, in this process."""

import typer


def train(context: typer.Context) -> None:
    """Fine-tune a model: all its weights, attention, or LoRA adapters.

    One process, as python -m hunyuan_vllm.train is; train/train.sh starts one
    for each GPU of one node or several. --help shows the flags.
    """
    from hunyuan_vllm.train.run import main

    raise typer.Exit(main(context.args))
