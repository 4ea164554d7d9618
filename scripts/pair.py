"""For the scripts beside this file: a pair with its store, and unprotected guests, in network namespaces."""
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

import guests
from guests import ROOT, VMFT, sh

STORE = os.environ.get("VMFT_STORE") or os.path.join(ROOT, "target/release/vmft-store")
ID = os.getpid()
CONTROL = "10.79.0"
DISK_MIB = 128
# The cores to pin to: host a, host b, the client of a guest on a, and the client of a guest on b.
PLACEMENTS = {"cores": (0, 1, 0, 1), "one-core": (0, 0, 1, 1), "free": None}


def prepare(guest, *packages):
    """Installs packages and builds the guest; builds vmft and vmft-store unless $VMFT and $VMFT_STORE name other binaries."""
    guests.prepare("e2fsprogs", "util-linux", *packages, guest=guest)
    if "VMFT_STORE" not in os.environ and subprocess.run(
            ["cargo", "build", "--release", "--bin", "vmft-store"], cwd=ROOT).returncode:
        raise SystemExit("building vmft-store failed; see above")


def ns(name):
    return f"vmft-pair-{name}-{ID}"


def ip(*words):
    sh("ip", *words)


def plug(interface, one, other, bridge_one=None, bridge_other=None, address=None):
    """Lays a cable between two namespaces. An end becomes a port of a bridge, if one is given;
    the other namespace's end gets the address, if one is given."""
    ip("-n", ns(one), "link", "add", interface, "type", "veth", "peer", "name", interface + "p", "netns", ns(other))
    for name, end, bridge in ((one, interface, bridge_one), (other, interface + "p", bridge_other)):
        if bridge:
            ip("-n", ns(name), "link", "set", end, "master", bridge)
        ip("-n", ns(name), "link", "set", end, "up")
    if address:
        ip("-n", ns(other), "address", "add", address, "dev", interface + "p")


class Site:
    """Namespaces for hosts a and b, a client and the store, and the processes in them; removed at the end."""

    def __init__(self, options):
        self.options, self.processes, self.guests = options, [], 0
        self.dir = tempfile.mkdtemp(prefix="vmft-pair-")

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
        ip("-n", ns("lan"), "address", "add", "10.77.0.1/24", "dev", "br0")
        ip("-n", ns("store"), "address", "add", f"{CONTROL}.3/24", "dev", "ctl")
        plug("chan", "a", "b", None, None, "10.78.0.2/24")
        ip("-n", ns("a"), "address", "add", "10.78.0.1/24", "dev", "chan")
        with open(self.path("empty.img"), "w") as file:
            file.truncate(DISK_MIB << 20)
        sh("mkfs.ext4", "-q", self.path("empty.img"))

    def __exit__(self, *_):
        for process in self.processes:
            # No process is expected to end by itself: show what it printed.
            if process.poll() is not None and process.stdout:
                print(f"{process.args} ended early:\n{process.stdout.read().decode(errors='replace')}", file=sys.stderr)
            process.kill()
            process.wait()
        for name in ("a", "b", "lan", "store"):
            subprocess.run(["ip", "netns", "delete", ns(name)])
        shutil.rmtree(self.dir)

    def start(self, name, *command, **kw):
        cores = PLACEMENTS[self.options.placement]
        pin = ["taskset", "-c", str(cores["ab".index(name)])] if cores and name in "ab" else []
        process = subprocess.Popen(["ip", "netns", "exec", ns(name), *pin, *command], **kw)
        self.processes.append(process)
        return process

    def make_keys(self):
        """Makes the keys of the store's members and of both hosts."""
        sh(STORE, "keys", "set", self.path("keys"), "--members", "1,2,3", "--hosts", "a,b",
           "--operators", "admin")

    def start_store(self):
        self.make_keys()
        peers = ",".join(f"{n}={CONTROL}.3:{7400 + n}" for n in (1, 2, 3))
        for n in (1, 2, 3):
            self.start("store", STORE, "serve", "--id", str(n), "--listen", f"{CONTROL}.3:{7400 + n}", "--peers", peers,
                       "--data", self.path(f"store-{n}"), "--keys", self.path(f"keys/{n}"),
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def path(self, name):
        return os.path.join(self.dir, name)

    def wire(self, hosts):
        """Makes a tap for a new guest on each of these hosts; returns its number, the same on all."""
        self.guests += 1
        for host in hosts:
            ip("-n", ns(host), "tuntap", "add", f"tap{self.guests}", "mode", "tap")
            ip("-n", ns(host), "link", "set", f"tap{self.guests}", "master", "br0", "up")
        return self.guests

    def boot(self, host, number, *command):
        """Starts a guest, or a side of a pair, with the options that all of them share."""
        options = self.options
        line = [VMFT, *command, "--guest", options.guest, "--cpu", options.cpu, "--memory-mib", str(options.memory_mib),
                "--tap", f"tap{number}", "--mac", mac(number), "--ip", f"{address(number)}/24"]
        if options.guest == "linux":
            disk = self.path(f"{host}{number}.img")
            sh("cp", "--sparse=always", self.path("empty.img"), disk)
            line += ["--disk", disk]
        return self.start(host, *line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def replica(self, host, number, *command):
        members = ",".join(f"{CONTROL}.3:{7400 + n}" for n in (1, 2, 3))
        return self.boot(host, number, *command, "--name", f"bench-{number}", "--keys", self.path(f"keys/{host}"),
                         "--store", f"raft://{members}?keys={self.path('keys/' + host)}",
                         "--control", self.path(f"{host}{number}.sock"))

    def pair(self):
        """Starts a pair; returns its number and its processes, the primary first."""
        number = self.wire("ab")
        peer = f"10.78.0.2:{7500 + number}"
        backup = self.replica("b", number, "backup", "--listen", peer)
        wait_for(backup, "waiting for a primary")
        primary = self.replica("a", number, "primary", "--peer", peer)
        wait_for(primary, "READY")
        return number, [primary, backup]

    def plain(self, hosts):
        """Starts an unprotected guest on each of these hosts; returns their numbers and processes."""
        numbers = [self.wire(host) for host in hosts]
        running = [self.boot(host, number, "run") for host, number in zip(hosts, numbers)]
        for process in running:
            wait_for(process, "READY")
        return numbers, running


def address(number):
    return f"10.77.0.{10 + number}"


def mac(number):
    return f"02:76:6d:66:74:{number:02x}"


def wait_for(process, text, seconds=180):
    """Reads a process's output until it contains text; what comes later is left in the pipe."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(end - time.monotonic(), 0))
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not data:
            raise SystemExit(f"{' '.join(process.args)} did not print {text!r}; its output:\n{seen}")
        seen += data.decode(errors="replace")
