"""What the server is started with: every case of the decision, read back with vLLM's own argument parser."""

import shlex
from argparse import Namespace
from dataclasses import replace

import httpx
import pytest
from launches import BONDED, CPU, DEMO, GIB, GPU8, HUB, LARGE, MODEL, NODE1, SMALL, launch, parsed
from vllm.utils.import_utils import resolve_obj_by_qualname

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.expert_load import EXTENSION
from hunyuan_vllm.server.exit_cause import exit_cause
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import decide
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import ApiPolicy, Flags
from hunyuan_vllm.util.errors import UserError

OPEN, KEYED = "hunyuan_vllm.server.middleware.stack.Open", "hunyuan_vllm.server.middleware.stack.BehindKey"


@pytest.mark.parametrize(
    ("machine", "model", "flags", "environ", "expected"),
    [
        # The demo model: one CPU worker, loopback, a cache of its own size.
        (CPU, DEMO, [], {}, {"model_tag": "/demo", "host": "127.0.0.1", "port": 8020, "tensor_parallel_size": 1}),
        (CPU, DEMO, [], {}, {"kv_cache_memory_bytes": 256 * 2**20, "max_model_len": -1}),
        (CPU, DEMO, [], {"TP_SIZE": "2"}, {"tensor_parallel_size": 2}),
        # A checkpoint on a CPU: half of what is left after the weights.
        (CPU, SMALL, [], {}, {"kv_cache_memory_bytes": 4 * GIB}),
        (CPU, SMALL, [], {"TP_SIZE": "8"}, {"kv_cache_memory_bytes": 13 * GIB // 8}),
        (CPU, MODEL, ["--kv-cache-memory-bytes", "1g"], {}, {"kv_cache_memory_bytes": 10**9}),
        (CPU, SMALL, ["--gpu-memory-utilization", "0.5"], {}, {"kv_cache_memory_bytes": None}),
        (CPU, SMALL, [], {"VLLM_CPU_KVCACHE_SPACE": "3"}, {"kv_cache_memory_bytes": None}),
        # GPUs of one machine, then of the whole Ray cluster.
        (GPU8, MODEL, [], {}, {"tensor_parallel_size": 8, "distributed_executor_backend": None}),
        (GPU8, HUB, [], {}, {"tensor_parallel_size": 8, "model_tag": HUB.name}),
        (GPU8, MODEL, [], {}, {"kv_cache_memory_bytes": None}),
        (NODE1, MODEL, [], {}, {"tensor_parallel_size": 16, "distributed_executor_backend": "ray"}),
        (NODE1, MODEL, [], {"TP_SIZE": "8"}, {"tensor_parallel_size": 8, "distributed_executor_backend": None}),
        (NODE1, MODEL, ["-tp", "16"], {"TP_SIZE": "8"}, {"tensor_parallel_size": 16}),
        (NODE1, MODEL, ["-pp=2"], {}, {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}),
        (NODE1, MODEL, ["-pp=2"], {}, {"distributed_executor_backend": "ray"}),
        # Overrides: a variable beats the default, a flag beats the variable.
        (GPU8, MODEL, [], {"PORT": "9001"}, {"port": 9001}),
        (GPU8, MODEL, ["--port=9002"], {"PORT": "9001"}, {"port": 9002}),
        (GPU8, MODEL, ["--tensor_parallel_size", "4"], {}, {"tensor_parallel_size": 4}),
        (GPU8, MODEL, ["--max-model-len", "4096"], {}, {"max_model_len": 4096}),
        (GPU8, MODEL, ["--served-model-name", "a", "b"], {}, {"served_model_name": ["a", "b"]}),
        (GPU8, MODEL, [], {}, {"served_model_name": ["hunyuan", "/models/large"]}),
        (GPU8, MODEL, [], {"LOCAL_IP": "10.0.0.5"}, {"host": "10.0.0.5"}),
        (GPU8, MODEL, [], {"LOCAL_IP": "10.0.0.5", "HOST": "127.0.0.1"}, {"host": "127.0.0.1", "middleware": [OPEN]}),
    ],
)
def test_decision(machine, model, flags, environ, expected):
    arguments = vars(parsed(launch(machine, model, *flags, **environ)))
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize("machine", [CPU, GPU8, NODE1], ids=["cpu", "gpu", "ray"])
def test_nothing_slow_or_unsafe_is_passed(machine):
    model = SMALL if machine is CPU else MODEL
    arguments = parsed(launch(machine, model))
    assert not arguments.enforce_eager
    assert not arguments.trust_remote_code
    assert arguments.allowed_origins == []
    assert arguments.max_num_seqs is None
    assert arguments.enable_prefix_caching is not False
    assert arguments.enable_chunked_prefill is not False


def test_a_users_flag_is_not_given_twice():
    made = launch(CPU, DEMO, "--port", "9000", "--max_model_len=1024", "-tp", "2", TP_SIZE="2")
    for names in (["--port"], ["--max-model-len", "--max_model_len=1024"], ["--tensor-parallel-size", "-tp"]):
        assert sum(made.argv.count(name) for name in names) == 1


def test_options_in_a_config_file_count_as_given(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("tensor_parallel_size: 4\nmax-model-len: 2048\n")
    made = launch(GPU8, MODEL, "--config", str(file))
    assert "--tensor-parallel-size" not in made.argv
    assert "--max-model-len" not in made.argv


@pytest.mark.parametrize(
    ("machine", "environ", "expected"),
    [
        # Over several nodes: LOCAL_IP's interface; bond1 before it, SOCKET_IFNAME before both.
        (NODE1, {"LOCAL_IP": "10.0.0.5"}, {"VLLM_HOST_IP": "10.0.0.5", "NCCL_SOCKET_IFNAME": "ib0"}),
        (BONDED, {"LOCAL_IP": "10.0.0.5"}, {"GLOO_SOCKET_IFNAME": "bond1", "NCCL_SOCKET_IFNAME": "bond1"}),
        (BONDED, {"LOCAL_IP": "10.0.0.5", "SOCKET_IFNAME": "eth0"}, {"NCCL_SOCKET_IFNAME": "eth0"}),
        (NODE1, {"LOCAL_IP": "10.0.0.5", "NCCL_SOCKET_IFNAME": "eth0"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
        (NODE1, {"LOCAL_IP": "10.0.0.5", "NCCL_SOCKET_IFNAME": "eth0"}, {"NCCL_SOCKET_IFNAME": None}),
        (NODE1, {}, {"NCCL_SOCKET_IFNAME": None, "VLLM_HOST_IP": None}),
        # On one machine: nothing beyond loopback, whatever address the server itself listens on.
        (GPU8, {}, {"NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}),
        (GPU8, {"LOCAL_IP": "10.0.0.5"}, {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}),
        (GPU8, {"SOCKET_IFNAME": "eth0"}, {"GLOO_SOCKET_IFNAME": "eth0", "VLLM_HOST_IP": None}),
        (CPU, {"TP_SIZE": "2"}, {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}),
        (GPU8, {}, {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}),
        (GPU8, {}, {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75", "VLLM_XGRAMMAR_CACHE_MB": "1"}),
        (GPU8, {"VLLM_XGRAMMAR_CACHE_MB": "64"}, {"VLLM_XGRAMMAR_CACHE_MB": None}),
    ],
)
def test_environment(machine, environ, expected):
    made = launch(machine, SMALL if machine is CPU else MODEL, **environ)
    assert {name: made.env.get(name) for name in expected} == expected


def test_a_hub_name_may_go_online():
    assert "HF_HUB_OFFLINE" not in launch(GPU8, HUB).env
    assert "HF_HUB_OFFLINE" not in launch(GPU8, MODEL, "--speculative-config", '{"model": "a/b"}').env


@pytest.mark.parametrize(
    ("machine", "model", "flags", "environ", "message"),
    [
        (CPU, DEMO, [], {"PORT": "80200"}, "PORT=80200"),
        (CPU, DEMO, [], {"PORT": "web"}, "PORT=web"),
        (CPU, DEMO, [], {"TP_SIZE": "0"}, "TP_SIZE=0"),
        (CPU, DEMO, [], {"LOCAL_IP": "node1"}, "LOCAL_IP=node1"),
        (CPU, DEMO, [], {"TP_SIZE": "3"}, r"use one of \[1, 2, 4, 8, 16\]"),
        (CPU, DEMO, ["-dp", "2"], {}, "data_parallel_size=2: .* start as many servers, with a router"),
        (CPU, DEMO, ["-ep", "-tp", "2"], {}, "enable_expert_parallel does not work on CPUs .* use tensor parallelism"),
        (CPU, MODEL, [], {}, r"needs 779\.5 GiB of memory and 32\.0 GiB is free"),
        (GPU8, MODEL, [], {"TP_SIZE": "16"}, "16 GPUs are asked for and 8 are here: set TP_SIZE=8 or less"),
        (GPU8, MODEL, [], {"LOCAL_IP": "10.9.9.9"}, "LOCAL_IP=10.9.9.9 is not this machine's address: it has 10.0.0.5"),
        (GPU8, MODEL, [], {"SOCKET_IFNAME": "bond1"}, "SOCKET_IFNAME=bond1 does not exist; this machine has eth0, ib0"),
        (Machine(cuda=True), MODEL, [], {}, "no GPU is visible"),
        (GPU8, ModelSource("/m", "/m", LARGE), [], {}, r"/m has no \*\.safetensors"),
        (GPU8, MODEL, ["--api-key", "secret"], {}, "--api-key would show the key"),
        (GPU8, MODEL, [], {"VLLM_API_KEY": "s", "HUNYUAN_VLLM_API_KEY_FILE": "/k"}, "both set"),
        (GPU8, MODEL, ["--config", "/no/such.yaml"], {}, "--config /no/such.yaml cannot be read"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(machine, model, flags, environ, message):
    with pytest.raises(UserError, match=message) as raised:
        launch(machine, model, *flags, **environ)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_gpus_that_do_not_divide_the_network_are_left_idle():
    made = launch(Machine(cuda=True, gpus=7), MODEL)
    assert parsed(made).tensor_parallel_size == 4
    assert made.notes == ["using 4 of 7 GPUs: the network cannot be divided over more"]


def test_without_a_compiler_the_cpu_model_runs_uncompiled():
    machine = replace(CPU, compiles=False)
    made = launch(machine, SMALL)
    assert parsed(made).enforce_eager and made.env["TORCH_COMPILE_DISABLE"] == "1"
    assert "g++" in made.notes[0]
    assert not parsed(launch(machine, SMALL, "-O2")).enforce_eager
    assert not parsed(launch(CPU, SMALL)).enforce_eager


def test_the_demo_model_is_compiled_only_where_that_is_asked_for():
    made = launch(CPU, DEMO)
    assert parsed(made).enforce_eager and made.env["TORCH_COMPILE_DISABLE"] == "1" and not made.notes
    asked = launch(CPU, DEMO, "-O2")
    assert not parsed(asked).enforce_eager and "TORCH_COMPILE_DISABLE" not in asked.env
    assert not parsed(launch(CPU, DEMO, "--tensor-parallel-size", "2")).enforce_eager


def test_the_engine_of_one_rank_on_a_cpu_is_forked():
    assert launch(CPU, SMALL).env["HUNYUAN_VLLM_FORK_ENGINE"] == "1"
    for other in (launch(CPU, SMALL, "--tensor-parallel-size", "2"), launch(GPU8, MODEL, "-tp", "1")):
        assert "HUNYUAN_VLLM_FORK_ENGINE" not in other.env


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        ((), "ray opentelemetry"),
        (("--distributed-executor-backend", "ray"), "opentelemetry"),
        (("--otlp-traces-endpoint", "http://127.0.0.1:4317"), "ray"),
        (("--tensor-parallel-size", "2"), None),
    ],
)
def test_ray_and_tracing_are_imported_where_they_are_used(flags: tuple[str, ...], unused: str | None):
    assert launch(CPU, SMALL, *flags).env.get("HUNYUAN_VLLM_UNUSED_PACKAGES") == unused


@pytest.mark.parametrize(
    ("environ", "insecure", "key_file", "needs_key"),
    [
        ({}, False, None, False),
        ({"VLLM_API_KEY": "secret"}, False, None, True),
        ({"HOST": "0.0.0.0"}, False, "/home/me/.config/hunyuan-vllm/api-key", True),
        ({"HOST": "0.0.0.0"}, True, None, False),
        ({"HOST": "0.0.0.0", "VLLM_API_KEY": "secret"}, True, None, True),
        ({"HOST": "::1"}, False, None, False),
        ({"LOCAL_IP": "10.0.0.5"}, False, "/home/me/.config/hunyuan-vllm/api-key", True),
        ({"HUNYUAN_VLLM_API_KEY_FILE": "/k"}, False, "/k", True),
    ],
)
def test_a_key_is_asked_for_beyond_loopback(environ, insecure, key_file, needs_key):
    made = launch(GPU8, MODEL, insecure=insecure, XDG_CONFIG_HOME="/home/me/.config", **environ)
    assert (str(made.key_file) if made.key_file else None, made.needs_key) == (key_file, needs_key)
    assert parsed(made).middleware == [KEYED if needs_key else OPEN]
    assert made.env.get("HUNYUAN_VLLM_API_KEY_FILE") == key_file
    assert "secret" not in made.shell()


@pytest.mark.parametrize(
    "flags",
    [
        ["--host="],
        ["--host", ""],
        ["--host", "None"],
        ["--hos", "0.0.0.0"],
        ["--host=127.0.0.1", "--hos=0.0.0.0"],
        ["--config", "CONFIG"],
        ["--uds="] + ["--host=0.0.0.0"],
    ],
)
def test_no_spelling_of_an_address_goes_without_a_key(flags, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("host: 0.0.0.0\n")
    flags = [str(file) if word == "CONFIG" else word for word in flags]
    made = launch(GPU8, MODEL, *flags)
    assert made.needs_key and parsed(made).middleware == [KEYED]
    assert made.host == "0.0.0.0" and (parsed(made).host or made.host) == made.host
    admitted = launch(GPU8, MODEL, *flags, insecure=True)
    assert not admitted.needs_key and ApiPolicy.read(admitted.env).insecure


def test_what_the_launch_says_of_the_server_is_what_vllm_understands():
    flags = ["--por", "7", "--ud=/run/s", "--headl", "--ssl-certf=c", "--served-model=mine", "-tp=2"]
    made = launch(GPU8, MODEL, *flags, HOST="0.0.0.0")
    assert (made.port, made.uds, made.headless, made.tls, made.model_name) == (7, "/run/s", True, True, "mine")
    assert not made.needs_key and parsed(made).tensor_parallel_size == 2
    assert launch(GPU8, MODEL, "--uds=", "--ssl-certfile=").uds is None
    assert not launch(GPU8, MODEL, "--ssl-certfile=").tls


def test_a_key_in_the_command_line_is_refused_in_every_spelling():
    for flags in (["--api-k", "secret"], ["--api_key=secret"], ["--api-key", "secret"]):
        with pytest.raises(UserError, match="--api-key would show") as raised:
            launch(GPU8, MODEL, *flags)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (["--grpc"], {"HOST": "0.0.0.0"}),
        (["--grpc", "--hos", "10.0.0.5"], {}),
        (["--grpc"], {"VLLM_API_KEY": "k"}),
        (["--grpc-port", "9"], {"HOST": "0.0.0.0"}),
        ([], {"VLLM_USE_RUST_FRONTEND": "1", "HOST": "0.0.0.0"}),
    ],
)
def test_servers_that_know_no_keys_are_refused_where_one_is_needed(flags, environ):
    with pytest.raises(UserError, match="without authentication"):
        launch(GPU8, MODEL, *flags, **environ)


def test_grpc_on_loopback_needs_no_key():
    assert parsed(launch(GPU8, MODEL, "--grpc")).grpc


def test_the_context_is_at_most_the_models():
    with pytest.raises(UserError, match=r"--max-model-len 140000 exceeds the model's 131072 tokens"):
        launch(GPU8, MODEL, "--max-model-l", "140k")
    for flags, environ in (
        (["--max-model-len", "128K"], {}),
        (["--max-model-len", "140k"], {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}),
        (["--max-model-len", "140k", "--hf-overrides.max_position_embeddings", "262144"], {}),
    ):
        assert parsed(launch(GPU8, MODEL, *flags, **environ)).max_model_len in (131072, 140000)
    v1 = HunYuanConfig(
        model_type="hunyuan_v1_moe", max_position_embeddings=32768, rope_scaling={"type": "dynamic", "alpha": 1000.0}
    )
    assert parsed(launch(GPU8, replace(MODEL, config=v1), "--max-model-len", "262144")).max_model_len == 262144
    with pytest.raises(UserError, match="262145 exceeds the model's 262144 tokens"):
        launch(GPU8, replace(MODEL, config=v1), "--max-model-len", "262145")


def test_a_users_middleware_stays_beside_ours():
    made = launch(GPU8, MODEL, "--middleware", "mine.Class", VLLM_API_KEY="k")
    assert parsed(made).middleware == [KEYED, "mine.Class"]


async def test_our_middleware_is_what_vllm_takes(monkeypatch):
    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setenv("VLLM_API_KEY", "k")
    for name, host, status in ((OPEN, "127.0.0.1", 200), (OPEN, "", 503), (KEYED, "", 401)):
        middleware = resolve_obj_by_qualname(name)
        assert isinstance(middleware, type)  # vLLM takes a function otherwise
        transport = httpx.ASGITransport(_as_vllms(middleware(application), host))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/v1/models")).status_code == status


def _as_vllms(app, host: str | None, uds: str | None = None):
    """`app` with the arguments of vLLM's server, as that has them."""
    state = Namespace(args=Namespace(host=host, uds=uds))

    async def called(scope, receive, send):
        await app({**scope, "app": Namespace(state=state)}, receive, send)

    return called


@pytest.mark.parametrize(
    ("host", "uds", "insecure", "serves"),
    [
        ("127.0.0.1", None, False, True),
        ("::1", None, False, True),
        ("0.0.0.0", "/run/s", False, True),
        ("", None, False, False),
        (None, None, False, False),
        ("10.0.0.5", None, False, False),
        ("0.0.0.0", None, True, True),
    ],
)
async def test_the_open_server_does_not_start_where_others_reach_it(monkeypatch, host, uds, insecure, serves):
    for name, value in ApiPolicy(insecure=insecure).environment({}).items():
        monkeypatch.setenv(name, value)
    sent = []

    async def application(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    monkeypatch.setattr("hunyuan_vllm.server.middleware.stack.build", lambda app, keys: app)
    app = _as_vllms(resolve_obj_by_qualname(OPEN)(application), host, uds)
    await app({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in sent] == [f"lifespan.startup.{'complete' if serves else 'failed'}"]
    assert serves or "without an API key" in exit_cause([f"ERROR:    {sent[0]['message']}"])


def test_the_shown_command_reads_back_as_what_is_run():
    made = launch(CPU, ModelSource("/my models/a'b", "/my models/a'b", LARGE, GIB), "--tool-call-parser", "x y")
    words = shlex.split(made.shell().replace("\\\n", " "))
    assert words[0] == "env"
    assert words[1 : 1 + len(made.env)] == [f"{name}={value}" for name, value in made.env.items()]
    assert words[1 + len(made.env) :] == made.argv


def test_a_key_from_the_environment_goes_with_ray():
    """Its workers do not get it: tests/test_ray_environment.py."""
    made = launch(NODE1, MODEL, VLLM_API_KEY="secret")
    assert parsed(made).distributed_executor_backend == "ray" and parsed(made).middleware == [KEYED]
    assert "secret" not in made.shell()


def test_administration_wants_a_key():
    admin = ApiPolicy(admin=True)
    made = decide(Settings.read({}), Flags([]), CPU, DEMO, {}, policy=admin)
    assert made.needs_key and made.key_file == Settings().config_home / "hunyuan-vllm" / "api-key"
    assert made.env["VLLM_SERVER_DEV_MODE"] == made.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert parsed(made).middleware == [KEYED]
    with pytest.raises(UserError, match="--admin-routes"):
        decide(Settings.read({}), Flags([]), CPU, DEMO, {}, policy=ApiPolicy(admin=True, insecure=True))
    assert "VLLM_SERVER_DEV_MODE" not in launch(CPU, DEMO).env


def test_a_limit_on_answers_is_also_their_default():
    limited = ApiPolicy(max_output_tokens=99)
    made = decide(Settings.read({}), Flags([]), CPU, DEMO, {}, policy=limited)
    assert parsed(made).override_generation_config == {"max_new_tokens": 99}
    assert ApiPolicy.read(made.env) == limited
    theirs = Flags(["--override-generation-config", "{}"])
    with pytest.raises(UserError, match="--max-output-tokens"):
        decide(Settings.read({}), theirs, CPU, DEMO, {}, policy=limited)


def test_json_logs():
    made = decide(Settings.read({}), Flags([]), CPU, DEMO, {}, json_logs=True)
    assert parsed(made).logging_config.formatter == "json"
    theirs = Flags(["--logging-config.formatter", "text"])
    made = decide(Settings.read({}), theirs, CPU, DEMO, {}, json_logs=True)
    assert parsed(made).logging_config.formatter == "text"


def test_the_load_of_experts_is_counted_by_our_extension():
    made = decide(Settings.read({}), Flags([]), CPU, DEMO, {}, expert_load=True)
    extension = resolve_obj_by_qualname(parsed(made).worker_extension_cls)
    assert callable(extension.expert_load)
    assert parsed(made).worker_extension_cls == EXTENSION
    theirs = Flags(["--worker-extension-cls", "mine.Class"])
    with pytest.raises(UserError, match="--expert-load"):
        decide(Settings.read({}), theirs, CPU, DEMO, {}, expert_load=True)


def test_a_renewed_certificate_is_taken():
    made = launch(CPU, DEMO, "--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem")
    assert parsed(made).enable_ssl_refresh and made.tls
    assert not parsed(launch(CPU, DEMO)).enable_ssl_refresh
