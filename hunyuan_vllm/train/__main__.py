"""`python -m hunyuan_vllm.train`: what torchrun starts in each process"""

import sys

from hunyuan_vllm.train.nodes import end_process
from hunyuan_vllm.train.run import main
from hunyuan_vllm.util.streams import prepare_output

if __name__ == "__main__":
    prepare_output()
    end_process(main(sys.argv[1:]))
