"""Options as vLLM's own parser understands them, without importing vLLM; and what a mistake in them is called."""

import subprocess
import sys
from pathlib import Path

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hunyuan_vllm.server import vllm_parser
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.server.vllm_parser import parse
from hunyuan_vllm.util.errors import UserError

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser

CONFIG = """
host: 0.0.0.0
tensor_parallel_size: 4
enable-prefix-caching: false
headless: true
served-model-name: [a, b]
speculative-config: {model: x, num_speculative_tokens: 3}
"""
DECIDED_ON = (
    "host", "port", "uds", "headless", "grpc", "model_tag", "tensor_parallel_size", "pipeline_parallel_size",
    "data_parallel_size", "nnodes", "data_parallel_address", "distributed_executor_backend", "served_model_name",
    "middleware", "root_path", "ssl_certfile", "ssl_keyfile", "api_key", "max_model_len", "quantization",
    "kv_cache_dtype", "tokenizer", "load_format", "enable_prefix_caching",
)  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--host="],
        ["--host", ""],
        ["--host", "None", "--uds", "None", "--ssl-certfile="],
        ["--hos", "0.0.0.0"],
        ["--host=127.0.0.1", "--hos=::", "--port", "9", "--por=10"],
        ["--ud", "/s", "--headl", "--grpc"],
        ["--ssl-certf", "c", "--ssl_keyfile=k", "--root_p", "/x", "--middlew", "a.B", "--middleware=c.D"],
        ["--api-k", "one", "two"],
        ["-tp", "2", "-pp=3", "--data_parallel_size=4", "-n", "2"],
        ["/model", "--tensor-parallel", "2", "--no-enable-prefix-caching", "-O3", "-q", "x", "--max-model-l", "4k"],
        ["/model", "--config", "CONFIG", "--tensor-parallel-size=2", "--port=7"],
        ["--config", "CONFIG"],
        ["--speculative-config.model", "x", "--port", "5", "--logging-config.formatter=json"],
        ["--kv-cache-dtype=fp8", "--distributed-executor=ray", "--served-model-name", "a", "b", "--max-model-len=auto"],
    ],
)
def test_it_understands_what_vllm_does(argv, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(CONFIG)
    argv = [str(file) if word == "CONFIG" else word for word in argv]
    parser = make_arg_parser(FlexibleArgumentParser())
    theirs, defaults = vars(parser.parse_args(argv)), vars(parser.parse_args([]))
    ours = parse(argv)
    for name in DECIDED_ON:
        assert ours.get(name, defaults[name]) == theirs[name], name
        assert (name in ours) >= (theirs[name] != defaults[name]), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-modellen", "9"], "--max-modellen is not an option .* did you mean --max-model-len[?]"),
        (["--max_modellen.secret=secret"], "did you mean --max-model-len[?]"),
        (["--tp=2"], "--tp is not an option .* did you mean -tp[?]"),
        (["--drry-run"], "did you mean --dry-run[?]"),
        (["--xyzzy", "secret"], "--xyzzy is not an option of this command or of vLLM .vllm serve --help=all"),
        (["/a", "/secret"], "too many arguments"),
        (["--port", "many"], "--port: invalid int value: 'many'"),
        (["--port"], "--port: expected one argument"),
        (["--dtype", "fp9"], "--dtype: invalid choice: 'fp9'"),
        (["--logging-config.formatter"], "--logging-config.formatter needs a value"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read: No such file"),
        (["--config"], "--config"),
        (["--config=options.yaml"], "write --config FILE"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config"),
        (["/a", "--model", "/b"], "given twice: /a and /b"),
    ],
)
def test_a_mistake_is_named_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        Flags(argv, ["--dry-run"])
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "model", "rest"),
    [
        (["/m", "--port", "9"], "/m", ["--port", "9"]),
        (["--port", "9", "/m"], "/m", ["--port", "9"]),
        (["--port", "9", "--model=/m"], "/m", ["--port", "9"]),
        (["--tokenizer", "/m", "/m"], "/m", ["--tokenizer", "/m"]),
        (["--model", "/m", "/m"], "/m", []),
        (["--port", "9"], None, ["--port", "9"]),
    ],
)
def test_the_model_among_options(argv, model, rest):
    flags = Flags(argv)
    assert (flags.model, flags.argv) == (model, rest)


def test_a_model_in_a_config_file(tmp_path):
    file = tmp_path / "options.yml"
    file.write_text("model: /m\nport: 9\n")
    flags = Flags(["--config", str(file)])
    assert (flags.model, flags.get("port"), flags.argv) == ("/m", 9, ["--config", str(file)])


def said_by_a_parse(cache: Path, environment_cache: Path) -> str:
    """What a new process says on standard error while it parses options; it must not import vLLM itself."""
    program = "\n".join(
        [
            "import sys",
            "from pathlib import Path",
            "from hunyuan_vllm.server import vllm_parser",
            "vllm_parser.ENVIRONMENT_CACHE = Path(sys.argv[1])",
            "options = vllm_parser.parse(['--hos', '0.0.0.0', '--max-model-len=4k'])",
            "print(options, 'torch' in sys.modules, 'vllm' in sys.modules)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program, environment_cache], capture_output=True, text=True, timeout=600,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cache), "VLLM_CACHE_ROOT": str(cache)},
    )  # fmt: skip
    assert done.stdout == "{'host': '0.0.0.0', 'max_model_len': 4000} False False\n", done.stderr
    return done.stderr


@pytest.mark.slow
def test_vllm_is_imported_once(tmp_path):
    """For the options of its version; from then on they are in the cache."""
    assert "reading vLLM's options" in said_by_a_parse(tmp_path, tmp_path / "none")
    assert said_by_a_parse(tmp_path, tmp_path / "none") == ""


def test_the_set_up_keeps_the_options_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_parser, "ENVIRONMENT_CACHE", tmp_path / "share")
    vllm_parser.keep_in_environment()
    assert said_by_a_parse(tmp_path / "home", tmp_path / "share") == ""
