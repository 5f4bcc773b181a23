"""`python -m hunyuan_vllm.train`: what torchrun starts in each process."""

import sys

from hunyuan_vllm.train.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
