"""A pair with its store, and unprotected guests beside it, in network namespaces; for the scripts beside this file."""
import os
import select
import shutil
import subprocess
import tempfile
import time

import guests
from guests import ROOT, VMFT, sh

STORE = os.environ.get("VMFT_STORE") or os.path.join(ROOT, "target/release/vmft-store")
ID = os.getpid()
# Guests by name: the host they run on, their tap and their address.
GUESTS = {"primary": ("a", "tap0", "10.77.0.10"), "backup": ("b", "tap0", "10.77.0.10"),
          "plain-a": ("a", "tap1", "10.77.0.11"), "plain-b": ("b", "tap1", "10.77.0.12"),
          "again-a": ("a", "tap2", "10.77.0.13"), "again-b": ("b", "tap2", "10.77.0.14")}
CONTROL = "10.79.0"
DISK_MIB = 128


def prepare(guest, *packages):
    """Installs packages, builds the guest, and vmft and vmft-store unless others are asked for."""
    guests.prepare("e2fsprogs", "util-linux", *packages, guest=guest)
    if "VMFT_STORE" not in os.environ and subprocess.run(
            ["cargo", "build", "--release", "--bin", "vmft-store"], cwd=ROOT).returncode:
        raise SystemExit("the build of the store failed")


def ns(name):
    return f"vmft-pair-{name}-{ID}"


def ip(*words):
    sh("ip", *words)


def plug(interface, one, other, bridge_one=None, bridge_other=None, address=None):
    """A cable between two namespaces; each end is a port of a bridge, or has an address."""
    ip("-n", ns(one), "link", "add", interface, "type", "veth", "peer", "name", interface + "p", "netns", ns(other))
    for name, end, bridge in ((one, interface, bridge_one), (other, interface + "p", bridge_other)):
        if bridge:
            ip("-n", ns(name), "link", "set", end, "master", bridge)
        ip("-n", ns(name), "link", "set", end, "up")
    if address:
        ip("-n", ns(other), "address", "add", address, "dev", interface + "p")


class Site:
    """Hosts a and b, a client, and the store, in namespaces; what runs in them. Gone at the end."""

    def __init__(self, options):
        self.options, self.processes, self.dir = options, [], tempfile.mkdtemp(prefix="vmft-pair-")

    def __enter__(self):
        return self

    def make(self):
        for name in ("a", "b", "lan", "store"):
            ip("netns", "add", ns(name))
            ip("-n", ns(name), "link", "set", "lo", "up")
        for name, bridge in (("a", "br0"), ("b", "br0"), ("lan", "br0"), ("store", "ctl")):
            ip("-n", ns(name), "link", "add", bridge, "type", "bridge")
            ip("-n", ns(name), "link", "set", bridge, "up")
        for host in "ab":
            plug(f"lan-{host}", "lan", host, "br0", "br0")
            plug(f"ctl-{host}", "store", host, "ctl", None, f"{CONTROL}.{'ab'.index(host) + 1}/24")
        for guest, (host, tap, _) in GUESTS.items():
            ip("-n", ns(host), "tuntap", "add", tap, "mode", "tap")
            ip("-n", ns(host), "link", "set", tap, "master", "br0", "up")
        ip("-n", ns("lan"), "address", "add", "10.77.0.1/24", "dev", "br0")
        ip("-n", ns("store"), "address", "add", f"{CONTROL}.3/24", "dev", "ctl")
        plug("chan", "a", "b", None, None, "10.78.0.2/24")
        ip("-n", ns("a"), "address", "add", "10.78.0.1/24", "dev", "chan")
        with open(self.path("empty.img"), "w") as file:
            file.truncate(DISK_MIB << 20)
        sh("mkfs.ext4", "-q", self.path("empty.img"))

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for name in ("a", "b", "lan", "store"):
            subprocess.run(["ip", "netns", "delete", ns(name)])
        shutil.rmtree(self.dir)

    def start(self, name, *command, **kw):
        cores = {"free": "", "one": "0"}.get(self.options.placement, {"a": "0", "b": "1"}.get(name, ""))
        pin = ["taskset", "-c", cores] if cores and name in "ab" else []
        process = subprocess.Popen(["ip", "netns", "exec", ns(name), *pin, *command], **kw)
        self.processes.append(process)
        return process

    def start_store(self):
        sh(STORE, "keys", self.path("keys"), "--members", "1,2,3", "--clients", "a,b")
        peers = ",".join(f"{n}={CONTROL}.3:{7400 + n}" for n in (1, 2, 3))
        for n in (1, 2, 3):
            self.start("store", STORE, "serve", "--id", str(n), "--listen", f"{CONTROL}.3:{7400 + n}", "--peers", peers,
                       "--data", self.path(f"store-{n}"), "--keys", self.path(f"keys/{n}"),
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def path(self, name):
        return os.path.join(self.dir, name)

    def boot(self, guest, *command):
        """Starts a guest, or a side of the pair, with what all have alike."""
        host, tap, address = GUESTS[guest]
        disk = self.path(f"{guest}.img")
        sh("cp", "--sparse=always", self.path("empty.img"), disk)
        number = list(GUESTS).index(guest) if command[0] == "run" else 0
        return self.start(host, VMFT, *command, "--guest", self.options.guest, "--cpu", "soft", "--memory-mib",
                          str(self.options.memory_mib), "--tap", tap, "--mac", f"02:76:6d:66:74:{number + 1:02x}",
                          "--ip", f"{address}/24", "--disk", disk,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def replica(self, guest, *command):
        host = GUESTS[guest][0]
        members = ",".join(f"{CONTROL}.3:{7400 + n}" for n in (1, 2, 3))
        return self.boot(guest, *command, "--name", "bench", "--keys", self.path(f"keys/{host}"), "--store",
                         f"raft://{members}?keys={self.path('keys/' + host)}", "--control", self.path(f"{host}.sock"))

    def pair(self):
        self.start_store()
        backup = self.replica("backup", "backup", "--listen", "10.78.0.2:7500")
        wait_for(backup, "waiting for a primary")
        primary = self.replica("primary", "primary", "--peer", "10.78.0.2:7500")
        wait_for(primary, "READY")
        return primary, backup

    def plain(self, *guests):
        running = [self.boot(guest, "run") for guest in guests]
        for process in running:
            wait_for(process, "READY")
        return running


def wait_for(process, text, seconds=180):
    """Reads what a process prints until it has printed text; what comes later is left in the pipe."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(end - time.monotonic(), 0))
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not data:
            raise SystemExit(f"no {text!r} from {' '.join(process.args)}:\n{seen}")
        seen += data.decode(errors="replace")
