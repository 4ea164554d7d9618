"""Running guests for the scripts beside this file: two hosts in network namespaces, and a guest with its console."""
import os
import re
import select
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Another binary to measure: VMFT=/path/to/vmft.
VMFT = os.environ.get("VMFT") or os.path.join(ROOT, "target/release/vmft")
HOST, CLIENT = f"vmft-q{os.getpid()}", f"vmft-p{os.getpid()}"
# Addresses of a guest on tap0 and of one on tap1, which may run beside it; the first MAC is vmft's own choice.
GUESTS = ("10.78.0.2", "10.78.0.3")
MACS = ("02:76:6d:66:74:01", "02:76:6d:66:74:02")
GUEST = GUESTS[0]
# Cores of guests and of their client, if they are to stay there.
CORES = None
MEMORY_MIB = 256
# QEMU's -icount where it is quickest, and where it records; virtio-net then needs tx=timer, else the replay never ends.
QUICKEST, RECORDED = "shift=0,sleep=off", "shift=3"


def sh(*command, **kw):
    return subprocess.run(command, check=True, capture_output=True, text=True, **kw).stdout


def prepare(*packages, guest="linux"):
    """Installs packages, builds the guest, and vmft unless another is asked for."""
    sh(os.path.join(ROOT, "scripts/needs"), "iproute2", *packages)
    if "VMFT" not in os.environ and subprocess.run(["cargo", "build", "--release", "--bin", "vmft"], cwd=ROOT).returncode:
        raise SystemExit("the build failed")
    sh(os.path.join(ROOT, "guest-images/build"), guest)


class Hosts:
    """A host with taps, and a client on the same network; removed at the end."""

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
        # Connections that the last guest left behind look for it while the next boots. That this fails must not be an
        # answer to who connects to the next: redis-benchmark would wait for ever.
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
    """Requests a second of redis-benchmark."""
    out = on_client("redis-benchmark", "-h", guest, "-t", operation, "-c", str(connections), "-n", str(requests), "--csv")
    return float(out.strip().splitlines()[-1].split(",")[1].strip('"'))


class Vm:
    """A running guest; its console is read as it comes."""

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
                raise SystemExit(f"no {text!r} from {self.process.args[4]}:\n{self.seen}")
            self.seen += data.decode(errors="replace")
        return time.monotonic() - self.start

    def type(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def ended(self):
        """All that it printed, once it has ended by itself with success."""
        self.seen += self.process.stdout.read().decode(errors="replace")
        if self.process.wait():
            raise SystemExit(f"{self.process.args[4]} failed:\n{self.seen}")
        return self.seen

    def cpu_s(self):
        """CPU seconds that the process has used."""
        # Of all its threads: the clock that clock_getcpuclockid(3) names.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def beyond_ram_mib(self):
        """Resident memory of the process but for its largest mapping, which is the guest's RAM."""
        kib = [int(k) for k in re.findall(r"^Rss:\s+(\d+)", open(f"/proc/{self.process.pid}/smaps").read(), re.M)]
        return (sum(kib) - max(kib)) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def vmft(extra, net, command=("run",), number=0):
    """vmft's command line for the Linux guest, which is on the tap of this number."""
    line = [VMFT, *command, "--guest", "linux", "--cpu", "soft", "--memory-mib", str(MEMORY_MIB), "--cmdline", extra]
    return line + (["--tap", f"tap{number}", "--mac", MACS[number], "--ip", f"{GUESTS[number]}/24"] if net else [])


def qemu(extra, ip=None, icount=None, log=None, tap="tap0", mac=MACS[0], memory_mib=MEMORY_MIB):
    """QEMU's command line for the Linux guest. With icount (as its option -icount has it) instructions are counted; with
    log it records there."""
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
