//! A raw disk image file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use entry::{DiskRequest, DiskResult, DiskWork};

use crate::error::Error;
use crate::failpoint;
use crate::options;

/// Bytes in a sector.
const SECTOR: u64 = 512;

/// An open image.
pub struct Image {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Image {
    /// Opens the image, which must be whole sectors.
    ///
    /// # Errors
    /// It cannot be opened as asked, or its size is wrong.
    pub fn open(disk: &options::Disk) -> Result<Image, Error> {
        let name = disk.path.display();
        let config = |why: String| Error::config("disk", format!("{name}: {why}"));
        let file = OpenOptions::new().read(true).write(!disk.read_only).open(&disk.path);
        let file = file.map_err(|e| config(e.to_string()))?;
        let bytes = file.metadata().map_err(|e| config(e.to_string()))?.len();
        if bytes == 0 || bytes % SECTOR != 0 {
            return Err(config(format!("its size, {bytes} bytes, is not a positive multiple of {SECTOR}")));
        }
        lock(&file).map_err(|e| config(format!("{e}: another vmft may be using it")))?;
        Ok(Image { file, path: disk.path.clone(), bytes })
    }

    /// A copy of the image that may be written whatever becomes of it, and is gone with this value.
    ///
    /// # Errors
    /// There is no room beside the image, or it cannot be read.
    pub fn private_copy(disk: &options::Disk) -> Result<Image, Error> {
        let mut name = disk.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".replay-{}", std::process::id()));
        let path = disk.path.with_file_name(name);
        let failed = || Error::host(format!("private copy {}", path.display()));
        std::fs::copy(&disk.path, &path).map_err(failed())?;
        let file = OpenOptions::new().read(true).write(true).open(&path);
        std::fs::remove_file(&path).map_err(failed())?;
        let file = file.map_err(failed())?;
        let bytes = file.metadata().map_err(failed())?.len();
        Ok(Image { file, path, bytes })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Does what a request asks for.
    ///
    /// # Errors
    /// The host's: it is no answer for the guest.
    pub fn perform(&self, request: &DiskRequest) -> Result<DiskResult, Error> {
        let failed = |what: String| Error::host(format!("{}: {what}", self.path.display()));
        // A write would make a file that was cut off long again, with zeros for what is lost.
        let bytes = self.file.metadata().map_err(failed("size".into()))?.len();
        if bytes != self.bytes {
            let why = format!("it has {bytes} bytes, and had {} at the start", self.bytes);
            return Err(failed("size".into())(std::io::Error::other(why)));
        }
        match &request.work {
            DiskWork::Read { offset, len } => {
                let mut data = vec![0; *len as usize];
                let read = self.file.read_exact_at(&mut data, *offset);
                read.map_err(failed(format!("read of {len} bytes at {offset}")))?;
                Ok(DiskResult::Read(data))
            }
            DiskWork::Write { offset, data } => {
                let written = self.file.write_all_at(data, *offset);
                written.map_err(failed(format!("write of {} bytes at {offset}", data.len())))?;
                Ok(DiskResult::Done)
            }
            DiskWork::Flush => {
                self.file.sync_data().map_err(failed("flush".into()))?;
                Ok(DiskResult::Done)
            }
        }
    }
}

/// A thread that does an image's requests one after the other, so that those that overlap run in their order.
pub struct Disk {
    requests: Sender<DiskRequest>,
    thread: JoinHandle<Image>,
}

impl Disk {
    /// Starts the thread; `done` takes the result of each request by its id, and says whether to go on.
    pub fn start(
        image: Image,
        mut done: impl FnMut(u64, Result<DiskResult, Error>) -> bool + Send + 'static,
    ) -> Disk {
        let (requests, work) = channel::<DiskRequest>();
        let thread = std::thread::spawn(move || {
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
        Disk { requests, thread }
    }

    /// Begins a request. `false`: the disk has failed, as its `done` was told.
    pub fn request(&self, request: DiskRequest) -> bool {
        self.requests.send(request).is_ok()
    }

    /// Lets the requests that have begun end, and gives the image back.
    ///
    /// # Panics
    /// When the thread did.
    pub fn stop(self) -> Image {
        drop(self.requests);
        self.thread.join().expect("the disk's thread does not panic")
    }
}

/// Two machines on one image would destroy it.
fn lock(file: &File) -> std::io::Result<()> {
    file.try_lock().map_err(std::io::Error::from)
}
