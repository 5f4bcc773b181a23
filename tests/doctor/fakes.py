"""A machine made of files: /proc, /sys and /dev below a directory, and an nvidia-smi that says what a test wants."""

import sys
from collections.abc import Callable
from pathlib import Path

from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.findings import Finding, Section, Status

GPU = "{index}, NVIDIA H20, 570.86.15, 9.0, 97871, 4, Disabled, 0"
BANNER = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: {cuda} |"


def machine(tmp_path: Path, files: dict[str, str] | None = None, **environ: str) -> System:
    """`files` lie below the root; PATH has nothing but what `nvidia_smi` puts there."""
    for name, text in (files or {}).items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for directory in ("bin", "home", "cwd", "root"):
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
    variables = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")} | environ
    return System(variables, tmp_path / "cwd", tmp_path / "root", timeout=60)


def nvidia_smi(system: System, *gpus: str, cuda: str = "12.8", fails: str = "") -> None:
    """Put an nvidia-smi on the machine's PATH."""
    gpus = gpus or tuple(GPU.format(index=index) for index in range(2))
    answers = {
        "--query-gpu=": "\n".join(gpus) + "\n",
        "": BANNER.format(cuda=cuda) + "\n",
    }
    script = [f"#!{sys.executable}", "import sys"]
    if fails:
        script.append(f"sys.exit({fails!r})")
    script.append(f"answers = {answers!r}")
    script.append("given = ' '.join(sys.argv[1:])")
    script.append("sys.stdout.write(next(text for start, text in answers.items() if given.startswith(start)))")
    tool = Path(system.environ["PATH"], "nvidia-smi")
    tool.write_text("\n".join(script) + "\n")
    tool.chmod(0o755)


def look(check: Callable[..., object], *arguments: object, **keywords: object) -> dict[str, Finding]:
    """The findings of a check by their subject; each that is wrong has a remedy."""
    section = Section("test")
    check(section, *arguments, **keywords)
    assert all(finding.remedy for finding in section.findings if finding.status in (Status.PROBLEM, Status.WARNING))
    return {finding.subject: finding for finding in section.findings}


def statuses(findings: dict[str, Finding]) -> dict[str, str]:
    return {subject: finding.status.value for subject, finding in findings.items()}
