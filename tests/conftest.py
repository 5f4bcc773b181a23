"""Settings every test process needs before vLLM is imported."""

import os
import signal

# One process, so that a test can look into the engine and patch it; TP and PP tests still start their worker processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Ranks on one small machine must not bind to the same cores.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A suite that was started in the background would hand its ignoring of Ctrl-C on to programs that are tested for it.
signal.signal(signal.SIGINT, signal.default_int_handler)
