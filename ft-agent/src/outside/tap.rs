//! Tap devices: Ethernet frames to and from the host's network.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::Error;

/// An open tap. Frames come without a packet-information header; reads and writes do not block.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Attaches to the tap `name` and brings it up. If it does not exist it is created, and removed when the process ends.
    ///
    /// # Errors
    /// The tap is in use, or the process lacks the right (CAP_NET_ADMIN, unless the tap belongs to this user).
    pub fn open(name: &str) -> Result<Tap, Error> {
        let what = format!("cannot attach to tap {name} (needs root, unless the tap belongs to this user)");
        Self::attach(name).map_err(Error::host(what))
    }

    fn attach(name: &str) -> io::Result<Tap> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
        // A persistent tap keeps the settings of its last user. QEMU leaves checksum offload enabled, with which a guest
        // that does not support it drops all TCP segments. SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0) })?;
        set_up(name)?;
        Ok(Tap { file, name: name.into() })
    }

    /// The error of this host that a failed use of the tap is.
    pub fn failed(&self, source: io::Error) -> Error {
        let why = match source.raw_os_error() {
            Some(libc::EBADFD) => " (was it deleted?)",
            _ => "",
        };
        Error::Host { what: format!("tap {} cannot be used any more{why}", self.name), source }
    }

    /// Waits until the tap fails, for `longest` at most. An error says why; frames that come are not touched.
    pub fn wait_for_failure(&self, longest: PollTimeout) -> io::Result<()> {
        let mut tap = [PollFd::new(self.file.as_fd(), PollFlags::empty())];
        match poll(&mut tap, longest) {
            Ok(0) | Err(Errno::EINTR) => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EBADFD)),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads one frame into `buffer` and returns its length. `WouldBlock` if no frame waits.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Discards the frames that wait.
    pub fn drain(&self) -> io::Result<()> {
        let mut buffer = [0; 64];
        loop {
            match self.receive(&mut buffer) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes one frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A request that names the interface, for ioctls.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero, because the name is a C string.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Brings the interface up.
fn set_up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = interface_request(name);
    // SAFETY: SIOCGIFFLAGS fills the flags of one ifreq, which lives across the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) })?;
    // SAFETY: the call above has set this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & libc::IFF_UP as i16 != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct ethtool_value` of linux/ethtool.h.
    #[repr(C)]
    struct EthtoolValue {
        cmd: u32,
        data: u32,
    }

    /// Whether the host leaves checksums to the device.
    fn computes_checksums(name: &str) -> bool {
        const SIOCETHTOOL: libc::c_ulong = 0x8946;
        const ETHTOOL_GTXCSUM: u32 = 0x16;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let mut value = EthtoolValue { cmd: ETHTOOL_GTXCSUM, data: 0 };
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: SIOCETHTOOL reads one ifreq and writes the value that it points to; both live across the call.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request) }).unwrap();
        value.data != 0
    }

    #[test]
    fn checksum_offload_that_an_earlier_user_enabled_is_disabled() {
        if !nix::unistd::geteuid().is_root() {
            let skipped = "checksum_offload_that_an_earlier_user_enabled_is_disabled: needs root";
            eprintln!("skipped: {skipped}");
            if let Some(list) = std::env::var_os("VMFT_SKIPPED") {
                let mut list = OpenOptions::new().append(true).open(list).unwrap();
                writeln!(list, "{skipped}").unwrap();
            }
            return;
        }
        const TUN_F_CSUM: libc::c_int = 1;
        let name = format!("vmft-t{}", std::process::id());
        let tap = Tap::open(&name).unwrap();
        let fd = tap.file.as_raw_fd();
        // SAFETY: TUNSETPERSIST takes a number.
        check(unsafe { libc::ioctl(fd, libc::TUNSETPERSIST, 1) }).unwrap();
        // SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, TUN_F_CSUM) }).unwrap();
        assert!(computes_checksums(&name));
        drop(tap);
        let tap = Tap::open(&name).unwrap();
        // SAFETY: TUNSETPERSIST takes a number.
        check(unsafe { libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETPERSIST, 0) }).unwrap();
        assert!(!computes_checksums(&name));
    }
}
