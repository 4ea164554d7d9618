"""For the scripts beside this file: a host and a client in network namespaces, and running guests with their consoles."""
import os
import re
import select
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# VMFT=/path/to/vmft in the environment measures another binary.
VMFT = os.environ.get("VMFT") or os.path.join(ROOT, "target/release/vmft")
HOST, CLIENT = f"vmft-q{os.getpid()}", f"vmft-p{os.getpid()}"
# Addresses of the guests on tap0 and tap1; the first MAC is vmft's default.
GUESTS = ("10.78.0.2", "10.78.0.3")
MACS = ("02:76:6d:66:74:01", "02:76:6d:66:74:02")
GUEST = GUESTS[0]
# The cores to pin guests and their client to; None pins nothing.
CORES = None
MEMORY_MIB = 256
# QEMU's -icount for the fastest run, and for recording; virtio-net then needs tx=timer, or the replay never ends.
QUICKEST, RECORDED = "shift=0,sleep=off", "shift=3"


def sh(*command, **kw):
    return subprocess.run(command, check=True, capture_output=True, text=True, **kw).stdout


def prepare(*packages, guest="linux"):
    """Installs packages, builds the guest, and builds vmft unless $VMFT names another binary."""
    sh(os.path.join(ROOT, "scripts/needs"), "iproute2", *packages)
    if "VMFT" not in os.environ and subprocess.run(["cargo", "build", "--release", "--bin", "vmft"], cwd=ROOT).returncode:
        raise SystemExit("building vmft failed; see above")
    sh(os.path.join(ROOT, "guest-images/build"), guest)


class Hosts:
    """A host with two taps, and a client on the same network, as namespaces; removed at the end."""

    def __enter__(self):
        for ns in (HOST, CLIENT):
            sh("ip", "netns", "add", ns)
        h = ("ip", "-n", HOST, "link")
        sh(*h, "add", "br0", "type", "bridge")
        sh(*h, "set", "br0", "up")
        sh(*h, "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", CLIENT)
        sh(*h, "set", "veth0", "master", "br0", "up")
        for tap in ("tap0", "tap1"):
            sh("ip", "-n", HOST, "tuntap", "add", tap, "mode", "tap")
            sh(*h, "set", tap, "master", "br0", "up")
        sh("ip", "-n", CLIENT, "address", "add", "10.78.0.1/24", "dev", "eth0")
        sh("ip", "-n", CLIENT, "link", "set", "eth0", "up")
        # Connections that the last guest left open make the client resolve its address while the next guest boots. Without
        # a permanent entry that lookup fails, and a new connection to the guest would fail with it: redis-benchmark would hang.
        for guest, mac in zip(GUESTS, MACS):
            sh("ip", "-n", CLIENT, "neigh", "add", guest, "lladdr", mac, "nud", "permanent", "dev", "eth0")
        return self

    def __exit__(self, *_):
        for ns in (HOST, CLIENT):
            subprocess.run(["ip", "netns", "delete", ns])


def pinned(who):
    return ("taskset", "-c", str(CORES[who])) if CORES else ()


def on_client(*command):
    return sh("ip", "netns", "exec", CLIENT, *pinned(1), *command)


def redis(operation, connections, requests, guest=GUEST):
    """Requests a second, as redis-benchmark measures them."""
    out = on_client("redis-benchmark", "-h", guest, "-t", operation, "-c", str(connections), "-n", str(requests), "--csv")
    return float(out.strip().splitlines()[-1].split(",")[1].strip('"'))


class Vm:
    """A running guest and its console."""

    def __init__(self, command):
        self.start, self.seen = time.monotonic(), ""
        self.process = subprocess.Popen(["ip", "netns", "exec", HOST, *pinned(0), *command], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wait_for(self, text, seconds=180):
        """Seconds from the start until the console has printed text."""
        while text not in self.seen:
            left = self.start + seconds - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                raise SystemExit(f"{self.process.args[4]} did not print {text!r}; its output:\n{self.seen}")
            self.seen += data.decode(errors="replace")
        return time.monotonic() - self.start

    def type(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def ended(self):
        """Waits until the process has ended; returns everything it printed. Exits if it failed."""
        self.seen += self.process.stdout.read().decode(errors="replace")
        if self.process.wait():
            raise SystemExit(f"{self.process.args[4]} failed:\n{self.seen}")
        return self.seen

    def cpu_s(self):
        """CPU seconds that the process has used."""
        # The process's CPU-time clock, as clock_getcpuclockid(3) computes its number.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def beyond_ram_mib(self):
        """Resident memory of the process in MiB, without its largest mapping, the guest's RAM."""
        kib = [int(k) for k in re.findall(r"^Rss:\s+(\d+)", open(f"/proc/{self.process.pid}/smaps").read(), re.M)]
        return (sum(kib) - max(kib)) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def vmft(extra, net, command=("run",), number=0):
    """vmft's command line for the Linux guest, on the tap with this number if `net`."""
    line = [VMFT, *command, "--guest", "linux", "--cpu", "soft", "--memory-mib", str(MEMORY_MIB), "--cmdline", extra]
    return line + (["--tap", f"tap{number}", "--mac", MACS[number], "--ip", f"{GUESTS[number]}/24"] if net else [])


def qemu(extra, ip=None, icount=None, log=None, tap="tap0", mac=MACS[0], memory_mib=MEMORY_MIB):
    """QEMU's command line for the Linux guest. `icount` is the value of QEMU's option -icount; with `log` QEMU records into that
    file."""
    if ip:
        extra += f" ip={ip}:::255.255.255.0::eth0:off"
    line = [os.path.join(ROOT, "guest-images/linux/qemu"), "initrd", extra, "-m", str(memory_mib)]
    if icount:
        line += ["-icount", icount + (f",rr=record,rrfile={log}" if log else "")]
    if ip:
        line += ["-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no", "-device", f"virtio-net-device,netdev=n0,mac={mac}"
                 + (",tx=timer" if icount == RECORDED else "")]
        line += ["-object", "filter-replay,id=replay,netdev=n0"] if log else []
    return line
