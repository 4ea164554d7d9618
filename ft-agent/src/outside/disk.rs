//! Raw disk images, and the threads that serve them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use entry::{DiskRequest, DiskResult, DiskWork};

use crate::error::Error;
use crate::failpoint;
use crate::options;
use crate::{private_file, service};

/// Size of a sector, bytes.
const SECTOR: u64 = 512;

/// An open disk image.
pub struct Image {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Image {
    /// Opens and locks the image. Its size must be a multiple of a sector.
    ///
    /// # Errors
    /// The image cannot be opened, has a wrong size, or is locked by another process.
    pub fn open(disk: &options::DiskConfig) -> Result<Image, Error> {
        let name = disk.path.display();
        let unusable = |why: String| Error::config("disk", format!("cannot open disk image {name}: {why}"));
        let file = OpenOptions::new().read(true).write(!disk.read_only).open(&disk.path);
        let file = file.map_err(|e| unusable(e.to_string()))?;
        let bytes = file.metadata().map_err(|e| unusable(e.to_string()))?.len();
        if bytes == 0 || bytes % SECTOR != 0 {
            return Err(unusable(format!("its size, {bytes} bytes, is not a positive multiple of {SECTOR}")));
        }
        if let (false, Some(format)) = (disk.raw, other_format(&file).map_err(|e| unusable(e.to_string()))?) {
            return Err(unusable(format!(
                "it is a {format} image, and vmft takes raw ones; make one of it with `qemu-img convert -O raw`, or, if \
                 it is raw anyway, give {name},raw"
            )));
        }
        lock(&file).map_err(|e| unusable(format!("{e}: another vmft may be using it")))?;
        Ok(Image { file, path: disk.path.clone(), bytes })
    }

    /// Makes a copy of the image that may be written to, and that is removed when this value is dropped.
    ///
    /// # Errors
    /// The image cannot be read, or there is no space for the copy in its directory.
    pub fn private_copy(disk: &options::DiskConfig) -> Result<Image, Error> {
        let mut name = disk.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".replay-{}", std::process::id()));
        let path = disk.path.with_file_name(name);
        let failed = || Error::host(format!("cannot make private copy {}", path.display()));
        let mut file = private_file::create_new(&path).map_err(failed())?;
        let copied = File::open(&disk.path).and_then(|mut image| std::io::copy(&mut image, &mut file));
        std::fs::remove_file(&path).map_err(failed())?;
        copied.map_err(failed())?;
        let bytes = file.metadata().map_err(failed())?.len();
        Ok(Image { file, path, bytes })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Carries out a request.
    ///
    /// # Errors
    /// The host failed; the guest does not get to see this error.
    pub fn perform(&self, request: &DiskRequest) -> Result<DiskResult, Error> {
        let failed = |what: String| Error::host(format!("cannot {what} disk image {}", self.path.display()));
        // If the file was truncated a write would extend it again, with zeros in place of the lost data.
        let bytes = self.file.metadata().map_err(failed("use".into()))?.len();
        if bytes != self.bytes {
            let why = format!("it has {bytes} bytes, and had {} at the start", self.bytes);
            return Err(failed("use".into())(std::io::Error::other(why)));
        }
        match &request.work {
            DiskWork::Read { offset, len } => {
                let mut data = vec![0; *len as usize];
                let read = self.file.read_exact_at(&mut data, *offset);
                read.map_err(failed(format!("read {len} bytes at {offset} of")))?;
                Ok(DiskResult::Read(data))
            }
            DiskWork::Write { offset, data } => {
                let written = self.file.write_all_at(data, *offset);
                written.map_err(failed(format!("write {} bytes at {offset} of", data.len())))?;
                Ok(DiskResult::Done)
            }
            DiskWork::Flush => {
                self.file.sync_data().map_err(failed("flush".into()))?;
                Ok(DiskResult::Done)
            }
        }
    }
}

/// A thread that carries out a disk's requests one after the other, so that overlapping requests keep their order.
pub struct DiskThread {
    requests: Sender<DiskRequest>,
    thread: JoinHandle<Image>,
}

impl DiskThread {
    /// Starts the thread. It calls `done` with the id and the result of each request, and goes on while `done` returns true.
    pub fn start(
        image: Image,
        mut done: impl FnMut(u64, Result<DiskResult, Error>) -> bool + Send + 'static,
    ) -> DiskThread {
        let (requests, work) = channel::<DiskRequest>();
        let thread = service::start_at_last("disk", move || {
            for request in work {
                failpoint::wedge("disk");
                let result = image.perform(&request);
                let failed = result.is_err();
                if !done(request.id, result) || failed {
                    break;
                }
            }
            image
        });
        DiskThread { requests, thread }
    }

    /// Queues a request. `false`: the disk has failed, and `done` got its error.
    pub fn request(&self, request: DiskRequest) -> bool {
        self.requests.send(request).is_ok()
    }

    /// Waits until the queued requests have ended, and returns the image.
    ///
    /// # Panics
    /// The thread has panicked.
    pub fn stop(self) -> Image {
        drop(self.requests);
        self.thread.join().expect("the disk's thread does not panic")
    }
}

/// The format of an image that does not look raw: its first bytes are those of another format.
fn other_format(image: &File) -> std::io::Result<Option<&'static str>> {
    /// Offset, bytes and name of each format (`block/*.c` of QEMU).
    const FORMATS: [(usize, &[u8], &str); 8] = [
        (0, b"QFI\xfb", "qcow2"),
        (0, b"QED\0", "QED"),
        (0, b"KDMV", "VMDK"),
        (0, b"COWD", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (0x40, b"\x7f\x10\xda\xbe", "VDI"),
        (0, b"WithoutFreeSpace", "Parallels"),
    ];
    let mut head = [0; SECTOR as usize];
    image.read_exact_at(&mut head, 0)?;
    let format = FORMATS.iter().find(|(at, bytes, _)| head[*at..].starts_with(bytes));
    Ok(format.map(|(_, _, name)| *name))
}

/// Locks the image, because two machines that write to it would destroy it.
fn lock(file: &File) -> std::io::Result<()> {
    file.try_lock().map_err(std::io::Error::from)
}
