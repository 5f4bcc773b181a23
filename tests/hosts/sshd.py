"""OpenSSH's server on a test host, with a host key, accounts and passwords of the host's own."""

from hosts.network import Host

# The key exchange is named because the default one, which resists quantum computers, takes longer than all else.
CONFIG = """\
{more}
Port {port}
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin yes
PasswordAuthentication yes
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes yes
PidFile /run/sshd.pid
LogLevel VERBOSE
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
"""


class Sshd:
    """Started when made; `more` stands before the rest of its configuration, so that it wins."""

    def __init__(self, host: Host, port: int, password: str, more: str = "") -> None:
        self.host, self.port = host, port
        host.sh("rm -f /etc/ssh/ssh_host_*; rm -rf /etc/ssh/sshd_config.d /etc/ssh/ssh_config.d")
        self.set_password("root", password)
        self.new_key()
        host.run("tee", "/etc/ssh/sshd_config", input=CONFIG.format(port=port, more=more))
        self.start()

    def new_key(self) -> None:
        """A host key no one has seen, as after the host was installed anew (the running server keeps its old one)."""
        self.host.sh("rm -f /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key")

    def set_password(self, user: str, password: str) -> None:
        self.host.run("chpasswd", "-c", "SHA512", input=f"{user}:{password}\n")

    def add_user(self, user: str, password: str) -> None:
        """An account with a home, if it is not there yet."""
        self.host.sh(f"id {user} >/dev/null 2>&1 || useradd --create-home --shell /bin/bash {user}")
        self.set_password(user, password)

    def start(self) -> None:
        self.host.run("/usr/sbin/sshd", "-f", "/etc/ssh/sshd_config", "-E", "/var/log/sshd.log")

    def stop(self) -> None:
        """No new connection; those that are open go on."""
        self.host.sh("kill $(cat /run/sshd.pid); while [ -e /run/sshd.pid ]; do sleep 0.02; done")

    @property
    def fingerprint(self) -> str:
        """Of the host key, as `ssh-keygen -l` shows it."""
        return self.host.sh("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").split()[1]

    @property
    def log(self) -> str:
        return self.host.sh("cat /var/log/sshd.log")
