"""`python -m hunyuan_vllm.train`: what torchrun starts in each process."""

import sys

from hunyuan_vllm.streams import prepare_output
from hunyuan_vllm.train.ending import end_process
from hunyuan_vllm.train.run import main

if __name__ == "__main__":
    prepare_output()
    end_process(main(sys.argv[1:]))
