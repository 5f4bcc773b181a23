"""The options, questions and exit status of `deploy/login_ssh.py`."""

import getpass
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.cluster.connections import Steps
from hunyuan_vllm.cluster.credentials import default_keys, read_identity, read_password_file, this_user
from hunyuan_vllm.cluster.host_keys import PublicKey, parse_fingerprints, read_known_hosts
from hunyuan_vllm.cluster.hosts import Host, parse_hosts
from hunyuan_vllm.cluster.logins import MutualLogin, Pair
from hunyuan_vllm.cluster.ssh import Credentials
from hunyuan_vllm.envs import take_ssh_password
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Finding
from hunyuan_vllm.util.streams import prepare_output

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True)


def confirm_host_keys(hosts: Sequence[Host]) -> bool:
    """Ask at the terminal whether these keys are the hosts' own."""
    table = Table(title="Host keys not known yet", title_justify="left")
    for title in ("host", "kind", "fingerprint"):
        table.add_column(title, overflow="fold")
    for host in hosts:
        if key := host.host_key:
            table.add_row(host.name, key.kind, key.fingerprint)
    messages.print(table)
    _say("compare them with each host's console: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
    _say("do they all match? Type yes to pin them, anything else leaves these hosts out:")
    try:
        return input().strip().lower() == "yes"
    except EOFError:
        return False


def ask_password(hosts: Sequence[Host]) -> str:
    return getpass.getpass(f"password of {hosts[0].user} on {', '.join(host.name for host in hosts)}: ")


@app.command()
def login_ssh(
    ips: str = typer.Option(..., "--ips", help="The hosts, separated by commas: IPv4, IPv6 or names."),
    port: int = typer.Option(22, "--port", min=1, max=65535, help="Port of their SSH servers."),
    user: str = typer.Option(None, "--user", help="Account on every host.  [default: the current user]"),
    password: str = typer.Option(
        None,
        "--password",
        help="Password of that account. Other users can see it for a moment: prefer --password-file.",
    ),
    password_file: Path = typer.Option(None, "--password-file", help="File (chmod 600) with the password."),
    identity: Path = typer.Option(None, "--identity", help="Private key to log in with the first time."),
    fingerprints: str = typer.Option(
        None, "--fingerprints", help="Host keys to accept: HOST=SHA256:…,… or a file with HOST SHA256:… lines."
    ),
    yes: bool = typer.Option(False, "--yes", "-y", help="Ask nothing. Unknown host keys are refused."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    jobs: int = typer.Option(8, "--jobs", min=1, max=64, help="Hosts processed at a time."),
    timeout: float = typer.Option(
        15.0, "--timeout", min=1.0, help="Time limit in seconds for each connection and command."
    ),
) -> None:
    """Let hosts log in to each other, and this machine to them, by SSH key.

    Creates an ed25519 key for accounts without one, pins every host key, distributes both, and verifies every pair with
    ssh itself. A second run changes nothing.

    \b
    Examples:
      python3 deploy/login_ssh.py --ips 10.0.0.1,10.0.0.2 --port 36000
          shows host keys to confirm, asks for the password
      python3 deploy/login_ssh.py --ips node1,node2 --password-file pw \\
          --fingerprints node1=SHA256:…,node2=SHA256:…
          asks nothing
      python3 deploy/login_ssh.py --ips 10.0.0.1,fd00::2 --user ubuntu \\
          --identity cloud.pem --json

    \b
    The password comes from one of: --password-file, the environment variable
    HUNYUAN_SSH_PASSWORD, a prompt, --password. It is the same for all hosts, and
    needed only until a key of this machine is accepted.

    \b
    Exit status: 0 every pair was verified; 1 problems, each named; 2 wrong
    options; 130 interrupted.
    """
    me = this_user()
    hosts = parse_hosts(ips, port, user if user is not None else me.pw_name)
    trusted = parse_fingerprints(fingerprints, hosts)
    # deploy/login_ssh.py takes --password off the command line and hands it on as a file, before this is imported.
    secret = take_ssh_password()
    if password is None and password_file:
        secret = read_password_file(password_file)
    try:
        keys = [read_identity(identity)] if identity else []
        home = Path(me.pw_dir)
        credentials = Credentials([*keys, *default_keys(home)], secret if password is None else password)
        known, steps = read_known_hosts(home), Steps(jobs, messages)
        asks = not yes and sys.stdin.isatty() and sys.stderr.isatty()
        confirm, ask = (confirm_host_keys, ask_password) if asks else (None, None)
        found, pairs = MutualLogin(hosts, known, trusted, credentials, confirm, ask, steps, timeout).run()
    except KeyboardInterrupt:
        _say("interrupted: every file is complete, old or new; run it again to finish")
        os._exit(130)  # a normal exit would wait for threads that wait for hosts
    ok = not any(one.problem for one in pairs) and not any(host.problems for host in found)
    if as_json:
        print(_json(ok, found, pairs))
    else:
        _show(ok, found, pairs)
    raise typer.Exit(0 if ok else 1)


def _json(ok: bool, hosts: Sequence[Host], pairs: Sequence[Pair]) -> str:
    def key(found: PublicKey | None) -> dict[str, str] | None:
        return None if found is None else {"type": found.type, "fingerprint": found.fingerprint}

    def problem(found: Finding | None) -> dict[str, Any] | None:
        return None if found is None else {"what": found.text, "remedy": found.remedy}

    report = {
        "ok": ok,
        "changed": any(host.changed for host in hosts),
        "hosts": [
            {
                "host": host.name,
                "hostname": host.hostname,
                "host_key": key(host.host_key),
                "trust": host.trust,
                "user_key": key(PublicKey.parse((host.public_line or "").split())),
                "key_made": host.key_made,
                "changed": host.changed,
                "problems": [problem(found) for found in host.problems],
            }
            for host in hosts
        ],
        "pairs": [
            {"from": pair.source, "to": pair.target, "ok": pair.problem is None, "tried": pair.tried,
             "problem": problem(pair.problem)}
            for pair in pairs
        ],
    }  # fmt: skip
    return json.dumps(report, indent=2)


def _show(ok: bool, hosts: Sequence[Host], pairs: Sequence[Pair]) -> None:
    console = Console()
    table = Table()
    for title in ("#", "host", "host key", "its own key", "changed", "state"):
        table.add_column(title, overflow="fold")
    for number, host in enumerate(hosts, 1):
        host_key = f"{host.host_key.kind} {host.host_key.fingerprint}\n" if host.host_key else ""
        user_key = "" if host.public_line is None else "made" if host.key_made else "existed"
        state = Text("failed", style="red") if host.problems else Text("ok", style="green")
        name = host.name if host.hostname in (None, host.name) else f"{host.name}\n({host.hostname})"
        cells = (name, host_key + (host.trust or ""), user_key, "\n".join(host.changed) or "nothing")
        table.add_row(str(number), *map(Text, cells), state)
    console.print(table)
    problems = [(host.name, problem.text, problem.remedy) for host in hosts for problem in host.problems]
    # Of failed logins, those that no problem of their hosts explains: with all hosts from which they fail.
    failed = {host.name for host in hosts if host.problems}
    sources: dict[tuple[str, str, str], list[str]] = {}
    for pair in pairs:
        if pair.problem is not None and not {pair.source, pair.target} & failed:
            sources.setdefault((pair.target, pair.problem.text, pair.problem.remedy), []).append(pair.source)
    problems += [(f"{', '.join(names)} → {to}", text, remedy) for (to, text, remedy), names in sources.items()]
    for where, text, remedy in problems:
        # Text, not markup: some of it is what a host sent.
        console.print(Text.assemble((f"{where}: ", "bold red"), text), soft_wrap=True)
        console.print(Text(f"    {remedy}"), soft_wrap=True)
    verified = sum(pair.problem is None for pair in pairs)
    changed = "files were changed" if any(host.changed for host in hosts) else "nothing was changed"
    summary = f"{verified} of {len(pairs)} logins verified, {changed}."
    again = "" if ok else " Solve the problems above and run it again."
    console.print(Text(summary + again, style="bold"), soft_wrap=True)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    prepare_output()
    try:
        app(prog_name="login_ssh.py")
    except UserError as error:
        _say(str(error))
        sys.exit(2)


def _say(text: str) -> None:
    messages.print(f"login_ssh: {text}", markup=False, highlight=False, soft_wrap=True)
